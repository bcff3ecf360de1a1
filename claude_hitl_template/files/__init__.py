"""Files as data: manifests, the file area, and opening what an agent may have written."""

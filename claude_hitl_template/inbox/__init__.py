"""The pages that this service serves itself: the approver's inbox, and the page of each session."""

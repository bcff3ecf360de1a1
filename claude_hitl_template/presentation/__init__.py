"""How texts and calls are shown to people, whatever the medium."""

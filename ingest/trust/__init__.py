"""Which addresses may be opened, with which keys, and how addresses are logged without secrets."""

"""Files: what they hold is checked before it is used, and they are written atomically. Imports no other room."""

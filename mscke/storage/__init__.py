"""What an edit memory stands on: its table on disk, its changes, what makes two edits one fact, and the search."""

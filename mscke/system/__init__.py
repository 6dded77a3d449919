"""The floor that all stand on: files written whole, work in several processes."""

"""One file a method, one interface: an editor takes records and gives an edited model."""

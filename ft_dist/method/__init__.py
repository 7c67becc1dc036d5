"""What a run trains: one file per method behind one protocol, and the table of them."""

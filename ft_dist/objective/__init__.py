"""What training minimises, one file per objective."""

"""What builds the parts of this project that are shipped as data."""

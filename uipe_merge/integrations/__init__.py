"""Other programs' worlds: each module needs the extra of its name."""

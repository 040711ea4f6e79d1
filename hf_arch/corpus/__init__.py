"""From files to rows of tokens: reading, cleaning, duplicates, packing, noise. All of it streams."""

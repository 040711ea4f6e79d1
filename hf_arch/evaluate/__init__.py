"""What a language model makes of long texts: bits per byte over position and context, and a pass key to find again."""

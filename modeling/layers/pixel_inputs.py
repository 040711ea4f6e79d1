"""What inputs are called that are pixels: in a file of its own, since processors ask for it and need no model."""

MODALITIES = {"image": "pixel_values", "video": "pixel_values_videos"}  # beside text

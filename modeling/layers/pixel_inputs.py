"""What inputs are called that are pixels."""

MODALITIES = {"image": "pixel_values", "video": "pixel_values_videos"}  # beside text

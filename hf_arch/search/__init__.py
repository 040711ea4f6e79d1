"""Search by meaning: models learn which texts say the same, and are measured by what they find."""

"""A trained model as one of another kind: sparse, of other mixers, or with flat recurrences."""

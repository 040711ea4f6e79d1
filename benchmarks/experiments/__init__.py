"""Small tasks with published numbers: does an architecture learn what its paper says it learns?"""

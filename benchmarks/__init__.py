"""One script a question; what they measured is in results.csv."""

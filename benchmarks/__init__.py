"""One script for each question; each appends its measurements to a CSV file."""

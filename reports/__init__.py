"""Tables, pages and pictures out of a run's files and arrays. Knows no network."""

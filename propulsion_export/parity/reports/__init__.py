"""The verdict as JSON, HTML and JUnit."""

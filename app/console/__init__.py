"""The operator's web page: what it is told, every second, and the page itself. HTTP is the API's."""

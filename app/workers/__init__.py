"""Workers: what is known about each vLLM server, and how it is found out."""

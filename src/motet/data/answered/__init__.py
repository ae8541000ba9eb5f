"""Real pictures with gold answers, a file a domain: each reads published files and makes questions of them."""

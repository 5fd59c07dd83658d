"""`bisect generate`: do two sides continue a prompt alike, and if not, does noise explain it?"""

"""`bisect explain`: which everyday fault turns what a file gives into what a trace holds, and how sure is that?"""

"""`bisect replay`: which nodes of one trace does its file explain, given each node's own inputs?"""

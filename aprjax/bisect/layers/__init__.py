"""`bisect layers`, the main job: at which layer and stage do two sides part, and why?"""

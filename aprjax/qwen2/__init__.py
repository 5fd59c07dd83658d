"""qwen2"""

print("compare", __import__("sys").argv)

"""The routes: thin. Each reads, asks the file that knows, and answers.

What is read with GET answers HEAD by the same route, so that `Allow` names both; a second, GET alone, is there for the schema, in which
FastAPI cannot give one route of two methods two ids. Decorators apply from the bottom: the route of both is found first.
"""

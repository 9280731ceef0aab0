"""pytest -q examples --model NAME: see examples/check.py."""


def pytest_addoption(parser):
    parser.addoption("--model", help="a model's file to check, such as mine")

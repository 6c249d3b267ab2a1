"""The two functions that questions of this dataset need: --tools=data/lookup/shop.py."""
import tokenizer


def lookup(item: str, row) -> str:
    """
    Tells what one of an item costs.

    Args:
        item: The item, in the singular.

    Returns:
        Its price in dollars.
    """
    if item not in row.get('table', {}):
        raise ValueError(f'the shop has no {item}')
    return str(row['table'][item])


def calculate(expression: str) -> str:
    """
    Calculates.

    Args:
        expression: Numbers with + - * / and parentheses.

    Returns:
        The result.
    """
    return tokenizer.calculate(expression)

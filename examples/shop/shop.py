"""A shop as an agent's tools: plain Python, one object a rollout. Nothing of pact_nemo is imported."""


class Shop:
    def __init__(self, task):
        self.stock = {sku: dict(article) for sku, article in task["info"]["stock"].items()}
        self.orders = []

    def lookup(self, sku: str) -> dict:
        """Look up price and number in stock of an article.

        Args:
            sku: the article's code.
        """
        return self.stock[sku]

    def order(self, sku: str, count: int) -> str:
        """Order some pieces of an article.

        Args:
            sku: the article's code.
            count: how many pieces.
        """
        if count < 1 or count > self.stock[sku]["count"]:
            raise ValueError(f"{self.stock[sku]['count']} in stock")
        self.stock[sku]["count"] -= count
        self.orders.append([sku, count])
        return f"ordered {count} of {sku}"

    def state(self):
        return {"stock": self.stock, "orders": sorted(self.orders)}

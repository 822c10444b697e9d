"""Ring 2, works: generators whose every yield is a safe point. Stages know no scheduler."""

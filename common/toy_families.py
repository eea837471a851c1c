"""The kinds of bug that the toy tasks have: what each function looks like, what can be wrong, how an issue words it.

A family turns seeded names into a `Function` with one *site*, a piece of one line, and the *options* that could stand
there. One option is right; in the function with the bug another one stands. The options are also the first tries that
a reader of the issue may make, so the tests are chosen to tell the right one from every other (see toy_tasks).

The words for an option are `clear` (they fit it alone) or vague (they fit several: then the failing test settles it).
A clause says what is wanted; one that begins with "!" says what goes wrong.
"""

from dataclasses import dataclass, field


@dataclass
class Function:
    """One small function: `head` and `line` are its code, with `{site}` at the place that an option fills."""

    name: str
    params: list[str]
    options: list[str]  # text of the site; the one at `right` is correct
    right: int
    bug: int  # what stands there in the broken version
    line: str  # the line with the site, as it stands in the file; may be the def line
    cases: object  # cases(rng) -> tuple of arguments
    clear: dict[int, list[str]]  # option -> clauses that fit it alone
    vague: list[tuple[set[int], str]] = field(default_factory=list)  # (options it fits, clause)
    guess: int | None = None  # the option that anyone would try first, given the bug and an unclear clause
    head: str = ""  # other lines: a def line (where `line` is the body) or a body (where `line` is the def)
    family: str = ""

    def code(self, option: int) -> str:
        line = self.line.replace("{site}", self.options[option]).replace("{name}", self.name)
        head = self.head or f"def {self.name}({', '.join(self.params)}):"
        return f"{line}\n{head}\n" if line.startswith("def ") else f"{head}\n{line}\n"

    def wants(self, vaguely: bool, tested: bool) -> list[str]:
        """Clauses of an issue. A vague one fits the right option and not the bug. Where no failing test is seen before
        the first edit (`tested`), it must be what anyone would try first: a label has to follow from the screen."""
        unclear = [text for fits, text in self.vague if self.right in fits and self.bug not in fits
                   and (tested or self.right == self.guess or len(fits) == 1)]  # fmt: skip
        return unclear if vaguely and unclear else self.clear[self.right]


def _pick(rng, options, bug=None, right=None):
    """Two different indices: what is right and what stands there instead."""
    right = rng.randrange(len(options)) if right is None else right
    others = [i for i in range(len(options)) if i != right]
    return right, rng.choice(others) if bug is None else bug


def _body(name, params, options, line, cases, clear, rng, vague=(), bug=None, right=None,
          guess=None) -> Function:
    right, bug = _pick(rng, options, bug, right)
    guess = guess.get(bug) if isinstance(guess, dict) else guess
    return Function(name, params, options, right, bug, line, cases, clear, list(vague), guess)


def _two(rng):
    b = rng.randint(2, 9)
    return b + rng.randint(2, 9), b


def arithmetic(rng, names):
    """Two amounts put together by the wrong operation."""
    a, b = names.params(2)
    options = [f"{a} + {b}", f"{a} - {b}", f"max({a}, {b})", f"min({a}, {b})"]
    clear = {
        0: [f"{a} and {b} go together", f"the {b} comes on top of the {a}", f"it is {a} plus {b}",
            f"{b} gets added to {a}", f"the sum of {a} and {b} is due"],
        1: [f"the {b} comes off the {a}", f"it is {a} minus {b}", f"it is what {b} leaves of {a}",
            f"{b} gets taken away from {a}", f"the {a} less the {b} is due"],
        2: [f"the bigger of {a} and {b} wins", f"the larger one of {a} and {b} counts",
            f"it is {a} or {b}, whichever is more", f"the higher of {a} and {b} is due"],
        3: [f"the smaller of {a} and {b} wins", f"the lesser one of {a} and {b} counts",
            f"it is {a} or {b}, whichever is less", f"the lower of {a} and {b} is due"],
    }  # fmt: skip
    vague = [
        ({0, 1}, f"both {a} and {b} have a part in it"), ({0, 1}, f"the {b} changes the {a}"),
        ({2, 3}, f"only one of {a} and {b} counts"), ({2, 3}, f"it picks one out of {a} and {b}"),
    ]  # fmt: skip
    return _body(names.function(), [a, b], options, "    return {site}", _two, clear, rng, vague)


def boundary(rng, names):
    """A limit that counts or does not, and on which side of it one must be."""
    a, b = names.params(2)
    options = [f"{a} < {b}", f"{a} <= {b}", f"{a} > {b}", f"{a} >= {b}"]
    clear = {
        0: [f"{a} stays below {b}", f"{a} is under {b}, not on it", f"the {a} is less than the {b}"],
        1: [f"{a} is at most {b}", f"{a} may go up to {b} and be {b}", f"the {a} is no more than the {b}"],
        2: [f"{a} goes beyond {b}", f"{a} is over {b}, not on it", f"the {a} is more than the {b}"],
        3: [f"{a} is at least {b}", f"{a} may go down to {b} and be {b}", f"the {a} is no less than the {b}"],
    }
    clear = {i: [f"yes only if {text}" for text in texts] for i, texts in clear.items()}
    vague = [
        ({1, 3}, f"{a} equal to {b} is a yes too"), ({1, 3}, f"an {a} right on the {b} counts"),
        ({0, 2}, f"{a} equal to {b} is a no"), ({0, 2}, f"an {a} right on the {b} does not count"),
    ]  # fmt: skip

    def cases(rng):
        x = rng.randint(2, 9)
        return rng.choice([(x, x), (x, x), (x, x + 1), (x + 1, x)])

    return _body(names.function(), [a, b], options, "    return {site}", cases, clear, rng, vague,
                 guess={0: 1, 1: 0, 2: 3, 3: 2})  # fmt: skip


def off_by_one(rng, names):
    """A count that is one too many or one too few."""
    (xs,), (n,) = names.lists(1), names.params(1)
    options = [f":{n}", f":{n} + 1", f":{n} - 1"]
    clear = {
        0: [f"as many {xs} as {n} says", f"exactly {n} of the {xs} come back", f"no more and no fewer than {n} {xs}"],
        1: [f"one more of the {xs} than {n} says", f"{n} and then one of the {xs} come back",
            f"{n} plus one of the {xs} come back"],
        2: [f"one fewer of the {xs} than {n} says", f"{n} but one of the {xs} come back",
            f"{n} minus one of the {xs} come back"],
    }  # fmt: skip
    right, bug = _pick(rng, options)
    more = {0: 0, 1: 1, 2: -1}
    fits = {i for i in more if (more[i] > more[bug]) == (more[right] > more[bug]) and i != bug}
    vague = [(fits, f"!too {'few' if more[right] > more[bug] else 'many'} of the {xs} come back")]
    return _body(names.function(), [xs, n], options, f"    return {xs}[{{site}}]",
                 lambda rng: (rng.sample(range(1, 10), 4), rng.randint(1, 3)), clear, rng, vague, bug, right,
                 guess=0)  # fmt: skip


def wrong_variable(rng, names):
    """The wrong one of three inputs decides."""
    params = names.params(3)
    k = rng.randint(1, 3)
    options = [f"{p} + {k}" for p in params]
    clear = {i: [f"the {p} decides", f"it goes by the {p}", f"{p} is what counts", f"the {p} is the one to use",
                 f"all hangs on the {p}"] for i, p in enumerate(params)}  # fmt: skip
    right, bug = _pick(rng, options)
    fits = {0, 1, 2} - {bug}
    vague = [(fits, f"the {params[bug]} has no say"), (fits, f"!it looks at the {params[bug]}, which is wrong")]
    return _body(names.function(), params, options, "    return {site}",
                 lambda rng: tuple(rng.sample(range(1, 10), 3)), clear, rng, vague, bug, right)  # fmt: skip


def swapped(rng, names):
    """The two arguments of a call are the wrong way round."""
    a, b = names.params(2)
    call = rng.choice(["pow", "divmod", "range"])
    options = [f"{call}({a}, {b})", f"{call}({b}, {a})"]
    clear = {i: [f"{p} comes first and {q} second", f"!{p} and {q} are mixed up", f"{p} goes before {q}",
                 f"!{p} and {q} stand the wrong way round"] for i, (p, q) in enumerate([(a, b), (b, a)])}  # fmt: skip
    if call == "range":
        options = [f"list({o})" for o in options]
        cases = lambda rng: rng.choice([(x := rng.randint(1, 5), x + 2), (x + 2, x)])  # noqa: E731
    else:
        cases = lambda rng: tuple(rng.sample(range(2, 6), 2))  # noqa: E731
    return _body(names.function(), [a, b], options, "    return {site}", cases, clear, rng)


def missing_case(rng, names):
    """Nobody thought of an empty list."""
    (xs,) = names.lists(1)
    best, other = rng.sample(["max", "min"], 2)
    right = rng.choice([1, 1, 2, 3])
    options = [f"{best}({xs})", f"{best}({xs}, default=0)", f"{best}({xs}, default=None)", f"{best}({xs}, default=-1)"]
    options.append(options[right].replace(best, other))  # never right: makes the test look at a list with members too
    clear = {
        1: [f"no {xs} at all make zero", f"without any {xs} it is zero", "an empty list counts as zero"],
        2: [f"no {xs} at all make None", f"without any {xs} it is None", "an empty list gives None"],
        3: [f"no {xs} at all make minus one", f"without any {xs} it is minus one", "an empty list is minus one"],
    }
    vague = [({1, 2, 3}, "!an empty list breaks it"), ({1, 2, 3}, f"!it cannot do without {xs}"),
             ({1, 2, 3}, f"!it fails when there are no {xs}")]  # fmt: skip
    return _body(names.function(), [xs], options, "    return {site}",
                 lambda rng: ([] if rng.random() < 0.5 else rng.sample(range(1, 10), 2),), clear, rng, vague,
                 0, right, guess=1)  # fmt: skip


def wrong_default(rng, names):
    """A parameter that is left out takes the wrong value."""
    a, b = names.params(2)
    values = {0: "zero", 1: "one", 2: "two", 5: "five", 10: "ten"}
    chosen = sorted(rng.sample(sorted(values), 3))
    options = [f"{b}={v}" for v in chosen]
    clear = {i: [f"{b} is {values[v]} unless given", f"a {b} left out means {values[v]}",
                 f"without a {b} it takes {values[v]}"] for i, v in enumerate(chosen)}  # fmt: skip
    right, bug = _pick(rng, options)
    fits = {i for i in range(3) if (i > bug) == (right > bug) and i != bug}
    vague = [(fits, f"!a {b} left out counts too {'little' if right > bug else 'much'}")]
    made = _body(names.function(), [a, b], options, "", lambda rng: (rng.randint(3, 9),), clear, rng, vague, bug, right)
    made.line, made.head = f"def {{name}}({a}, {{site}}):", f"    return {a} + {b}"
    return made


def wrong_key(rng, names):
    """Another field of the record is read than the one that is wanted."""
    (row,), keys = names.params(1), names.keys(3)
    options = [f'"{k}"' for k in keys]
    clear = {i: [f"the {k} is what it looks up", f"it reads the {k}", f"the {k} of the {row} comes back",
                 f"it is about the {k}"] for i, k in enumerate(keys)}  # fmt: skip
    right, bug = _pick(rng, options)
    fits = {0, 1, 2} - {bug}
    vague = [(fits, f"!it reads the wrong part of the {row}"), (fits, f"!nobody asked for the {keys[bug]}")]
    return _body(names.function(), [row], options, f"    return {row}[{{site}}]",
                 lambda rng: (dict(zip(keys, rng.sample(range(1, 10), 3))),),
                 clear, rng, vague, bug, right)  # fmt: skip


def missing_return(rng, names):
    """The answer is computed and not handed back."""
    a, b = names.params(2)
    op = rng.choice([f"{a} + {b}", f"{a} - {b}", f"max({a}, {b})", f"min({a}, {b})"])
    options = [f"return {op}", op, f"print({op})"]
    clear = {0: ["!nothing comes back", "!it hands back None", "!the answer never comes out", "!it keeps the answer",
                 "!it says None whatever one asks", f"!{a} and {b} go in and nothing comes out"]}  # fmt: skip
    return _body(names.function(), [a, b], options, "    {site}", _two, clear, rng, right=0)


def string_case(rng, names):
    """Small and capital letters."""
    (s,) = names.params(1)
    options = [f"{s}.upper()", f"{s}.lower()", f"{s}.title()"]
    clear = {
        0: [f"the {s} is in capitals", f"all letters of the {s} are big", f"the {s} is in upper case"],
        1: [f"the {s} is in small letters", f"no letter of the {s} is big", f"the {s} is in lower case"],
        2: [f"each word of the {s} has a capital", "every word starts big", f"the {s} looks like a title"],
    }
    vague = [({0, 1, 2}, f"!the letters of the {s} have the wrong case")]
    right, bug = _pick(rng, options)
    vague = [({0, 1, 2} - {bug}, text) for _, text in vague]
    words = names.params(6)

    def cases(rng):
        first, second = rng.sample(words, 2)
        return (rng.choice([f"{first.title()} {second}", f"{first} {second.title()}"]),)

    return _body(names.function(), [s], options, "    return {site}", cases, clear, rng, vague, bug, right)


def aggregate(rng, names):
    """Many numbers made into one, by the wrong rule."""
    (xs,) = names.lists(1)
    options = [f"sum({xs})", f"max({xs})", f"min({xs})", f"len({xs})"]
    clear = {
        0: [f"all {xs} add up", f"it is the total of the {xs}", f"the {xs} count together"],
        1: [f"the biggest of the {xs} wins", f"it is the top one of the {xs}", f"no {xs} are above it"],
        2: [f"the smallest of the {xs} wins", f"it is the bottom one of the {xs}", f"no {xs} are below it"],
        3: [f"it is how many {xs} there are", f"it tells the number of {xs}", f"the {xs} get counted"],
    }
    vague = [({1, 2}, f"one of the {xs} comes back"), ({0, 3}, f"all of the {xs} have a part in it")]
    return _body(names.function(), [xs], options, "    return {site}",
                 lambda rng: (rng.sample(range(2, 10), 3),), clear, rng, vague)  # fmt: skip


def logic(rng, names):
    """Two conditions, joined the wrong way."""
    a, b = names.params(2)
    options = [f"{a} and {b}", f"{a} or {b}", f"{a} and not {b}"]
    clear = {
        0: [f"it takes the {a} as well as the {b}", f"{a} is not enough without {b}", f"{a} together with {b}"],
        1: [f"one of {a} and {b} is enough", f"{a} will do, and so will {b}", f"any of {a} and {b} will do"],
        2: [f"{a} is needed and no {b}", f"{a} counts without {b}", f"{a} but not {b}"],
    }
    vague = [({0, 2}, f"{b} alone is not enough"), ({0, 2}, f"{a} has to be there in any case")]
    return _body(names.function(), [a, b], options, "    return {site}",
                 lambda rng: (rng.random() < 0.5, rng.random() < 0.5), clear, rng, vague)  # fmt: skip


def separator(rng, names):
    """What stands between the parts of a text."""
    (xs,) = names.lists(1)
    options = ['"-"', '","', '"_"', '":"']
    clear = {i: [f"a {s} goes between the {xs}", f"the {xs} are kept apart by a {s}", f"each {s} parts two {xs}"]
             for i, s in enumerate(["dash", "comma", "underscore", "colon"])}  # fmt: skip
    right, bug = _pick(rng, options)
    vague = [({0, 1, 2, 3} - {bug}, f"!the wrong sign stands between the {xs}")]
    words = names.params(6)
    return _body(names.function(), [xs], options, f"    return {{site}}.join({xs})",
                 lambda rng: (rng.sample(words, 2),), clear, rng, vague, bug, right)  # fmt: skip


def ordering(rng, names):
    """The order in which things come back."""
    (xs,) = names.lists(1)
    options = [f"sorted({xs})", f"sorted({xs}, reverse=True)", f"list({xs})"]
    clear = {
        0: [f"the smallest of the {xs} comes first", f"the {xs} go up", f"the {xs} grow to the end"],
        1: [f"the biggest of the {xs} comes first", f"the {xs} go down", f"the {xs} fall to the end"],
        2: [f"the {xs} stay in place", f"the {xs} keep their order", f"nobody moves the {xs}"],
    }
    right, bug = _pick(rng, options)
    vague = [({0, 1, 2} - {bug}, f"!the {xs} come in the wrong order")]
    return _body(names.function(), [xs], options, "    return {site}",
                 lambda rng: (rng.sample(range(1, 10), 3),), clear, rng, vague, bug, right)  # fmt: skip


def _computed(rng, names, right: int, others: set[int], clauses: list[str]):
    """Adds a number that the issue does not tell: it tells what to reckon. `{a}` in a clause is the parameter."""
    (a,) = names.params(1)
    near = {right + rng.choice([-30, -20, -10, -7, -3, -2, 2, 3, 7, 10, 20, 30]) for _ in range(6)}
    wrong = sorted(n for n in near | others if n > 9 and n != right)
    options = [f"{a} + {n}" for n in [right, *rng.sample(wrong, 3)]]
    return _body(names.function(), [a], options, "    return {site}", lambda rng: (rng.randint(1, 9),),
                 {0: [clause.replace("{a}", a) for clause in clauses]}, rng, right=0)  # fmt: skip


def conversion(rng, names):
    """An amount in another unit."""
    unit, small, factor = rng.choice([("hours", "minutes", 60), ("minutes", "seconds", 60), ("days", "hours", 24),
                                      ("weeks", "days", 7), ("dozens", "pieces", 12), ("years", "months", 12)])  # fmt: skip
    n = rng.randint(3, 19)
    clauses = [f"{n} {unit} come on top of the {{a}}, in {small}", f"the {{a}} goes up by {n} {unit}, told in {small}",
               f"it is the {{a}} and {n} {unit} more, all in {small}"]  # fmt: skip
    return _computed(rng, names, n * factor, {n + factor, n * 10, n * 100, n}, clauses)


def product(rng, names):
    """So many times so many."""
    x, y = rng.randint(3, 19), rng.randint(6, 19)
    clauses = [f"{x} rows of {y} come on top of the {{a}}", f"the {{a}} goes up by {x} times {y}",
               f"it is the {{a}} and {x} packs of {y} more"]  # fmt: skip
    return _computed(rng, names, x * y, {x + y, x * (y + 1), (x + 1) * y}, clauses)


def total(rng, names):
    """Two amounts in one."""
    x, y = rng.randint(11, 89), rng.randint(11, 89)
    clauses = [f"both {x} and {y} come on top of the {{a}}", f"the {{a}} goes up by {x} and then by {y}",
               f"it is the {{a}} and {x} and {y} more"]  # fmt: skip
    return _computed(rng, names, x + y, {x, y, abs(x - y)}, clauses)


def remaining(rng, names):
    """What is left of an amount."""
    x, y = rng.randint(100, 300), rng.randint(11, 89)
    clauses = [f"{x} but for {y} come on top of the {{a}}", f"the {{a}} goes up by {x} less {y}",
               f"{y} out of {x} are gone and the rest goes to the {{a}}"]  # fmt: skip
    return _computed(rng, names, x - y, {x, y, x + y}, clauses)


SEEN = (arithmetic, boundary, off_by_one, wrong_variable, swapped, missing_case, wrong_default, wrong_key,
        missing_return, string_case, aggregate, logic)  # fmt: skip
TOLD = (arithmetic, boundary, string_case, aggregate, logic)  # train2, dev2, study2: the issue tells one of a few options,
COMPUTED = (conversion, product, total, remaining)  # or what to reckon, which is more than a very small student can do
UNSEEN = (separator, ordering)  # in splits other than train and train2 only

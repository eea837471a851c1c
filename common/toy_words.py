"""The names that toy tasks are made of: every word is one token for the embedded student, with and without a space.

Each word belongs to one role and one split, so no package, module, function or parameter is ever shared by two splits.
"""

SPLITS = ("train", "dev", "test", "study")
_SHARE = {"train": 10, "dev": 3, "test": 3, "study": 4}  # of every 20 words of a role

_PACKAGES = """
    market factory museum castle bank school club camp ranch farm mill shop office court park store church tower
    campus ship bridge house forest ocean river street town city region nation planet orbit team band guild gang
    staff league union
"""
_MODULES = """
    wallet cart order rack board table bench counter gate hall stage engine motor wheel pipe sensor radio meter
    clock scale mail letter paper recipe menu story song movie photo picture chart plan design pattern budget tax
    loan credit profit income sale trade policy law rule vote survey exam grade rating weather storm summer winter
    spring season harvest soil plant flower fruit apple bread meat milk sugar soup wine corn rice wheat horse dog
    fish bird lion mouse snake wolf fox
"""
_FUNCTIONS = """
    accept adapt adjust align allow answer apply assign attach balance bind block blow book boost bow brush build
    burn burst bury call cancel capture cast catch charge check choose claim clean clear cling clip clone coat
    collect command comment commit conduct confirm connect contact control convert cook cool craft create cross deal
    decay decode define delay demand depend deploy destroy detach detect develop dig digest direct display draft
    draw dream drive drop dump echo edit elect embed emit enable encode enter escape exclude execute expand expect
    export extend face feed feel fetch fight fill film find finish fix flag flash flatten flip flow flush fly focus
    fold follow force forget form forward freeze gather give grab grant grow guard guess guide handle hang haul hide
    hire hold hook hop host ignore inform insert install invent invest issue jump keep kick knit know launch lead
    learn leave level lift light link listen load lock log look love make manage mark mask match measure melt merge
    mine mix mount move nail name need notify offer own pace pack paste patch pause pay perform pick pin pitch place
    play please plot plug point poke pose post power predict prepare press prevent process prompt pull purpose push
    put quest query quote race raid rank reach read recall receive record reduce refresh release remove rename
    render rent repair repeat replace reply report request reshape resize resolve rest restore retry review reward
    ride ring roll rotate route rub run sample save scan score search secure seek sell send shape share shield shift
    shine shoot show shuffle sign sing skip sleep slip slow solve spot spread squeeze stamp stand start
    stay step stick stop stream strip study submit suggest supply support switch take talk tell thank think tick tie
    till track train travel treat trim trip trust tune turn update upload use vary verify view visit wait wake walk
    warn wash waste watch wear wire work wrap write
"""
_PARAMS = """
    anchor angel arrow ash bag ball bar base bat bath bay beam bean bear beat bed bee bell belt bill bit blood boat
    body bolt bone boot box brain branch brand bucket bud bug bus bush button camera canvas cap car card cash
    cat cell cent chain chair chip coal coast coin color cost crop crow cube cup curve dam date day dish doctor
    dollar door dose dot drug dust edge egg energy error eye fan fee fiber fig finger fire floor fluid food foot
    fuel gap gas gear glass goal gold grain grass gun hair hand hat head heart heat helium hill hole home horn
    hose hour ice ink iron jam jar jet job key kid king lad lake land lane leaf leg lens lid lime lip lung magic man
    mass meal mile money moon mouth mud neck nest net night noise nose note nut oil orange ounce oven page pain pair
    pan path peak pen person pet phone pie pig pill pit plane plate pole pool port pot pound powder price proof rail
    rain ram rate reed rib ridge risk road robe robot rock rod room root rose row rug rust salt sand screen script
    sea seat seed shell shirt shore side size skill skin sky slope slot snow sock son space spin spirit square
    star stem stock stone stroke stuff tail tale tank task term text theme thread thumb tile tin tip title toe
    tone tool tooth torch traffic tree tube unit venue voice volt volume wall war water wax wealth week weight
    width wind window wing winner wood word worm yard year zone
"""
_LISTS = """
    agents animals arms arts ashes backs bags balls bands banks bars beans beds bees belts berries birds boats bones
    books boxes brushes bugs cards cars cases cats cells chains chairs chips clients clips codes coins colors
    days dogs doors faces fields films fires flags flies flows flowers foods forests forts friends fuels games gates
    genes grams grids hands heads hips holes hosts hours houses inks jobs kids kits labels lands laws layers leaves
    letters lights lines loads logs maps markets masks mills months names nets notes nuts pages pairs papers paths
    people phones photos pieces places plains planes plants plots points poles ports posts pots prints rails rains
    rates rays regions rites rivers roads roles roots rules runs screens scripts seeds shapes sheets ships shirts
    shots sites skills skirts slots sources spaces spots stairs stars steps sticks stocks stones stores storms
    strokes subs tables tags tails tales tasks texts threads ticks ties times tips titles tokens tones tools
    tops tracks trees trials units users values vents views visions votes walks walls wards waters waves ways weeds
    weights wings words worms yards years
"""
_KEYS = """
    age area count depth duty fare height health length limit mode phase quality ratio role speed status style total
    value worth voltage benefit freedom gravity label offset origin output radius target threat vision agent author
    border center chief country density domain editor entity event family gender icon image journal keeper layer
    maker manager model month native number owner parent period player prefix product reader remote seller sender
    server session source station storage subject suffix summary symbol system tenant theory tier topic user version
    viewer writer
"""


POOLS = {
    "package": _PACKAGES, "module": _MODULES, "function": _FUNCTIONS,
    "param": _PARAMS, "list": _LISTS, "key": _KEYS,
}  # fmt: skip


def words(split: str, role: str) -> list[str]:
    """The names of one role that belong to one split; train2 has those of train, and so on."""
    split = split.removesuffix("2")
    start = sum(_SHARE[s] for s in SPLITS[: SPLITS.index(split)])
    every = POOLS[role].split()
    # 7 is prime to 20: neighbours in the (alphabetical) lists land in different splits
    return [w for i, w in enumerate(every) if start <= i * 7 % 20 < start + _SHARE[split]]

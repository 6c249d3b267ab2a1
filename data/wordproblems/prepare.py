"""
Word problems of grade school with worked solutions -> train.jsonl, val.jsonl, test.jsonl and unseen.jsonl here, and
pairs of answers to others -> prefs_train.jsonl and so on, and solutions with labelled steps -> stepwise_train.jsonl and
so on. Rows of the first:

    {"messages": [{"role": "user", "content": "Mia has 17 apples. Ben gives her 25 more. How many apples …?"},
                  {"role": "assistant", "content": "<think>17 + 25 = 42 apples</think>\nMia has 42 apples."}],
     "answer": "42", "grader": "number", "steps": 1, "kind": "addition"}

The answer is the last number of the text after </think>. A step is one line and one equation, a division that does not
come out even is written `23 / 5 = 4 remainder 3`. What training never sees: in val and test, the names of the persons
and, for each template, the numbers, which are others in val than in test; in unseen, the templates too. Choose a recipe
and a checkpoint by val, report test.

Rows of prefs are {"prompt": […], "chosen": […], "rejected": […]}, one answer right and clean, the other with one
of DEFECTS, and the label flipped in `noise` of them, as people err, but for empty answers; beside the keys above,
"defect", "flipped" and "margin", by how much the better one's `grade.quality` is higher.

Rows of stepwise are TRL's {"prompt": …, "completions": ["<think>17 + 25 = 43 apples</think>", "Mia has 43 apples."],
"labels": [false, false]}: a step is a line of the solution, right if it is that of the right one. Half of the solutions
have one of ERRORS ("defect"), after which they go on from the wrong number, so that all that depends on it is wrong.

    python data/wordproblems/prepare.py
    python data/wordproblems/prepare.py --train_rows=5000 --max_number=20 --max_steps=2 --seed=2
    python data/wordproblems/prepare.py --tools=True            into ../wordproblems_tools
    python data/wordproblems/prepare.py --tools=True --tool_share=0.3                       into ../wordproblems_mixed

With tools the same rows call the calculator: `17 + 25 = <tool>17 + 25</tool>[42] apples`, and of a division that does
not come out even for the remainder: `23 / 5 = 4 remainder <tool>23 - 4 * 5</tool>[3]`. There are chats alone then.
"""
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import runtime

from grade import quality, rendered
from preparation import folder_for, write_rows
from rows import fraction_of
from tokenizer import UserError, calculate

tools = False  # the steps call the calculator; this writes chats alone, and to another folder
tool_share = 1.0  # with tools: in this share of the rows, so that a model learns both ways
name = ''  # the dataset is written to data/NAME/; empty: wordproblems, wordproblems_tools or, of a share, _mixed
train_rows = 60_000  # to learn from
val_rows = 2_000  # with names and numbers held out, to choose by
test_rows = 2_000  # with names and other numbers held out, to report
unseen_rows = 1_000  # with templates held out, too
pref_rows = 30_000  # pairs and solutions to learn from; of the other splits as many as they have rows
noise = 0.1  # share of pairs whose label is flipped, in all splits; of those with an empty answer none is
max_number = 30  # largest number to add or subtract; factors go to 12, quotients to 20, results to three times this
max_steps = 4  # equations of the longest solutions, 1 to 4
seed = 1337  # decides the problems

STEP_SHARE = {1: 35, 2: 35, 3: 20, 4: 10}  # of the problems with so many steps, in percent, in each split
HELD_NUMBERS = 0.1  # share of a template's numbers that are for val, and as many for test
# what is wrong with the worse answer of a pair, and in how many of a hundred: the result; a step but not the result;
# the working, which is missing; it goes on after the answer; it is rude; it breaks off; there is none
DEFECTS = {'wrong_answer': 30, 'wrong_step': 20, 'no_working': 12, 'rambling': 12, 'rude': 10, 'truncated': 10,
           'empty': 6}
# what is wrong with a solution whose steps are labelled: the result of a step, a step that takes another number or
# another operation than it should, the sentence that gives the result; or a step's result, while the rest is right
ERRORS = ('slip', 'wrong_number', 'wrong_operation', 'wrong_sentence', 'lone_slip')

NAMES = {  # every sixth is held out
    'she': 'Mia Aisha Yuki Priya Elena Fatima Ingrid Chloe Amara Sofia Leila Hana Zoe Nadia Carmen Olga Maya Freya '
           'Camila Noor Ananya Mei Zainab Greta Lucia Naomi Thandi Ivana Rosa Salma Keiko Divya Bianca Astrid Wanjiru '
           'Paloma Ruth Sana Marta Linh Esther Giulia Ama Tala Nina Emma Siti Alma Kavya Helga Lina Abena Clara Yara '
           'Dana Nomsa Vera Jin Tereza Malia Sakura Anya',
    'he': 'Ben Omar Kenji Raj Mateo Yusuf Lars Liam Kwame Diego Tariq Jun Leo Ivan Pablo Boris Arjun Erik Santiago '
          'Hassan Vikram Wei Malik Otto Marco Elias Sipho Pavel Hugo Karim Hiro Rohan Bruno Sven Kamau Rafael Samuel '
          'Bilal Jan Minh Daniel Enzo Kofi Tane Felix Jack Budi Emil Nikhil Gustav Amir Kojo Oscar Idris Noah Themba '
          'Milan Sung Tomas Kai Haruto Dmitri'}
PERSONS = {name: who for who in NAMES for name in NAMES[who].split()}
HELD_NAMES = list(PERSONS)[5::6]
LEARNED_NAMES = [name for name in PERSONS if name not in HELD_NAMES]
PRONOUNS = {'she': {'he': 'she', 'him': 'her', 'his': 'her'}, 'he': {'he': 'he', 'him': 'him', 'his': 'his'}}
POOLS = {
    'toy': 'marble, sticker, pencil, crayon, seashell, stamp, coin, trading card, balloon, ribbon, bead, badge, '
           'toy car, postcard, puzzle piece, keychain, paper crane, feather, acorn, pinecone, ball, doll, kite, '
           'whistle, magnet, paintbrush, marker, eraser, notebook, domino, bracelet, poster, comic book, '
           'button, pebble, wooden block, bottle cap, toy robot, rubber duck, candle',
    'fruit': 'apple, pear, orange, plum, peach, cherry, strawberry, fig, mango, lemon, lime, apricot, tomato, carrot, '
             'potato, radish, cucumber, mushroom, chestnut, walnut, olive, onion, turnip',
    'treat': 'cookie, muffin, cupcake, bagel, pretzel, pancake, bread roll, scone, waffle, brownie, '
             'croissant, dumpling, samosa, empanada, cinnamon bun, sandwich, cheese stick, granola bar, tart',
    'ware': 'hat, scarf, lamp, shirt, mug, toy train, umbrella, basket, pillow, backpack, belt, vase, '
            'bowl, teapot, blanket, jacket, clock, novel, sweater, flute, football, drum, board game, '
            'picture frame, wallet, lunch box',
    'bloom': 'tulip, rose, daisy, sunflower, lily, marigold, poppy, violet, orchid, pansy, iris, peony',
    'animal': 'cow, sheep, goat, horse, pig, donkey, rabbit, alpaca, pony, llama',
    'bird': 'hen, duck, goose, turkey, quail, pigeon',
    'container': 'box, bag, basket, tray, crate, bucket, carton, sack, chest, bin',
    'vehicle': 'bus, train, boat, ferry, tram',
    'event': 'film, concert, football match, school play, dance show, workshop, chess tournament, party',
    'activity': 'reading, drawing, cooking, gardening, dancing, running, swimming, knitting, painting, singing, '
                'cycling, writing letters, practicing the piano, playing chess, doing homework, cleaning the kitchen',
    'job': 'gardener, carpenter, painter, tailor, baker, plumber, librarian, mechanic, tutor, cook, electrician, '
           'lifeguard, translator, dog walker',
    'club': 'choir, chess club, swimming class, art class, school band, hiking group, drama club, robotics club',
    'place': 'park, library, school, museum, market, beach, playground, train station',
    'altogether': 'altogether, in all, in total'}
POOLS = {pool: words.split(', ') for pool, words in POOLS.items()}
POOLS['thing'] = POOLS['toy'] + POOLS['fruit'] + POOLS['treat']
PLURALS = {'person': 'people', 'child': 'children', 'sheep': 'sheep', 'goose': 'geese', 'potato': 'potatoes',
           'tomato': 'tomatoes', 'mango': 'mangoes', 'domino': 'dominoes', 'scarf': 'scarves'}

# A template is a question (* before it: for unseen), "= ", its plan, "=> " and the sentence that gives the result.
# [x|y] is one of them; <x;y> are sentences in either order; {A}, {B}, {C} are persons and {he}, {him}, {his} stand for
# A; {a}, {b} … are numbers, {a thing} a number of some thing of POOLS (or of the very word), {things} its plural,
# {an thing} one of it, {thing2} another one, {a:is/are} the verb that goes with the number.
# A step of a plan is "s = a + b thing", or "q r = a / b" with a remainder, and then what the result counts;
# "a 2..9" gives the range of a number. Other factors lie between 2 and 12, other numbers below max_number.
TEMPLATES = {
    'addition': '''
{A} has {a thing}. [{B} gives {him} {b} more|Then {he} gets {b} more from {B}|{B} has {b} and gives all of them to {A}].
How many {things} does {A} have [now|then]?
= s = a + b thing => {A} has {s thing} now.
{A} has {a thing} [in a {container}|on a table|at home]. {he} gives {b} [of them |]to [{B}|a friend]. How many {things}
[are left|does {A} have left|does {A} still have]?
= s = a - b thing => {A} has {s thing} left.
[There are|{A} counts] {a animal} in the [barn|big field] and {b} [in the yard|on the hill|behind the fence]. How many
{animals} are there {altogether}?
= s = a + b animal => There {s:is/are} {s animal} {altogether}.
There are {a person} on a {vehicle}. At the [next|first|last] stop {b} of them get off[ and nobody gets on|]. How many
people [are still|stay] on the {vehicle}?
= s = a - b person => There {s:is/are} {s person} on the {vehicle}.
There are {a person} on a {vehicle}. At the [next|first] stop {b person} get off[, and| and] {c} get on. How many people
are on the {vehicle} [now|after that]?
= s = a - b person; t = s + c person => There {t:is/are} {t person} on the {vehicle}.
{A} bakes {a treat} in the morning and {b} [later that day|in the afternoon]. [{his} family eats|{he} sells|{he} gives
away] {c} of [them|these {treats}]. How many {treats} are left?
= s = a + b treat; t = s - c treat => There {t:is/are} {t treat} left.
{A} plants {a bloom} and {b bloom2} [in the garden|in front of the house|behind the school]. How many flowers does {he}
plant {altogether}?
= s = a + b flower => {A} plants {s flower} {altogether}.
{A} is reading a book of {a page}. [So far {he} has read {b page}|{he} has already read {b} of them]. How many pages
[are left to read|does {he} still have to read]?
= s = a - b page => {A} still has {s page} to read.
{A}, {B} and {C} collect {toys}. <{A} finds {a toy}.;{B} finds {b toy}.;{C} finds {c toy}.> How many {toys} do the three
friends have {altogether}?
= s = a + b toy; t = s + c toy => The three friends have {t toy} {altogether}.
[In a game|In a quiz] {A} scores {a point} in the first round and {b point} in the second. In the third round {he} loses
{c point}, and in the last one {he} wins {d}. How many points does {he} have at the end?
= s = a + b point; t = s - c point; u = t + d point => {A} has {u point} at the end.
There are {a child} in the {club}. {b} of them are [girls|beginners|wearing glasses|left-handed]. How many of the
children are not?
= s = a - b child => {s child} {s:is/are} not.
*{A} had {a toy}. {B} gave {him} some more, and [now|today] {he} has {b}. How many {toys} did {A} get from {B}?
= s = b - a toy => {A} got {s toy} from {B}.
*A {container} [holds|contains] {a thing}. {A} [takes|pulls] out {b} of them, and {B} takes out {c}. How many {things}
are [still|left] in the {container}?
= s = a - b thing; t = s - c thing => There {t:is/are} {t thing} in the {container}.
''',
    'multiplication': '''
{A} has {a container} of {things}. [There are {b thing} in each {container}|Each {container} holds {b thing}]. How many
{things} does {he} have {altogether}?
= s = a * b thing => {A} has {s thing} {altogether}.
[A hall has|In a theater there are|{A} sets up] {a row} of chairs with {b chair} in [each|every] row. How many chairs
are there {altogether}?
= s = a * b chair => There are {s chair} {altogether}.
There are {a animal} [on a farm|in a barn|on a hill]. Each {animal} has 4 legs. How many legs do the {animals} have
{altogether}?
= s = a * 4 leg => The {animals} have {s leg} {altogether}.
{A} [learns|looks up|writes down] {a word} of [Spanish|Japanese|Arabic|French] every day. How many words is that
[in|after] {b day}?
= s = a * b word => That is {s word}.
{A} fills {a tray} with {b treat} each. [Then {he} puts {c} more on a plate|On a plate there are {c} more]. How many
{treats} are there {altogether}?
= s = a * b treat; t = s + c treat => There are {t treat} {altogether}.
{A} has {a container} with {b thing} in each[ of them|]. {he} gives {c thing} to [{B}|{his} neighbors|{his} class]. How
many {things} does {he} have left?
= s = a * b thing; t = s - c thing => {A} has {t thing} left.
{A} plants {a row} of {blooms}, with {b bloom} in [each|every] row. [Snails|Rabbits] eat {c} of them. How many {blooms}
are left?
= s = a * b bloom; t = s - c bloom => There {t:is/are} {t bloom} left.
A rectangular [wall|floor|patio] is {a tile} wide and {b tile} [long|deep]. [How many tiles does {A} need to cover
it|How many tiles cover the whole of it]?
= s = a * b tile => It takes {s tile}.
A shop gets {a box} with {b toy} [each|in each] and {c bag} with {d toy2} [each|in each]. How many items [does it get|is
that] {altogether}?
= s = a * b toy; t = c * d toy2; u = s + t item => The shop gets {u item} {altogether}.
{A} drinks {a glass} of [water|milk|tea|juice] [each|every] day. How many glasses does {he} drink in {b} weeks of 7
days?
= a 2..5; b 2..5; s = b * 7 day; t = s * a glass => {A} drinks {t glass}.
One cake needs {a egg}. {A} [wants to bake|bakes|makes] {b cake} for [a party|the market|a wedding|{his} friends]. How
many eggs does {he} need?
= s = b * a egg => {A} needs {s egg}.
*{A} [swims {a lap}|runs {a lap}|walks {a lap}] every morning and keeps this up for {b day}. How many laps is that
{altogether}?
= s = a * b lap => {A} does {s lap} {altogether}.
*[A parking garage has {a floor}|There are {a floor} in a parking garage]. Each floor has room for {b car}. Today
{c car} are parked in the garage. How many more cars can park?
= s = a * b car; t = s - c car => There is room for {t car}.
''',
    'sharing': '''
{A} [shares|divides] {a thing} equally among {b child}. How many {things} does each child get?
= s = a / b thing => Each child gets {s thing}.
{A} packs {a thing} into {containers}, {b} [in each|in every one]. {he} fills as many {containers} as possible. How many
{things} are left over?
= q r = a / b => There {r:is/are} {r thing} left over.
{A} shares {a thing} among {b friend}. Each friend gets the same number, as many as possible. How many {things} does
each friend get?
= q r = a / b => Each friend gets {q thing}.
{A} has {a thing}. A full {container} holds {b}. How many {containers} can {he} fill [completely|to the top]?
= q r = a / b => {A} can fill {q container}.
[{a child} and their teachers go camping|{a child} go on a camping trip]. A tent has room for {b child}. How many tents
do the children need[, if nobody sleeps outside|]?
= q r = a / b; s = q + 1 tent => The children need {s tent}.
<{A} has {a thing}.;{B} has {b thing}.> They put them together and share them equally among {c child}. How many {things}
does each child get?
= s = a + b thing; t = s / c thing => Each child gets {t thing}.
{A} bakes {a treat}. {he} [keeps|eats|gives {B}] {b} of them and puts the others on {c plate}, the same number on each.
How many {treats} are on each plate?
= s = a - b treat; t = s / c treat => There {t:is/are} {t treat} on each plate.
{A} has {a container} with {b thing} [each|in each]. {he} shares all the {things} equally among {c child}. How many
{things} does each child get?
= s = a * b thing; t = s / c thing => Each child gets {t thing}.
{a child} [meet at the {place}|come to the {club}] and make teams of {b}. They make as many teams as they can. How many
children are left without a team?
= q r = a / b => There {r:is/are} {r child} without a team.
{A} cuts a [rope|ribbon|string] of {a meter} into pieces of {b meter}. How many meters are left [over|at the end]?
= q r = a / b => There {r:is/are} {r meter} left over.
{A} buys {a container} with {b fruit} each. {c} of the {fruits} [are spoiled|have spots], so {he} throws them away and
shares the others equally among {d neighbor}. How many {fruits} does each neighbor get?
= s = a * b fruit; t = s - c fruit; u = t / d fruit => Each neighbor gets {u fruit}.
{A} has {a toy} and buys {b} more. {he} puts them all into {containers} of {c} until there are too few for another
{container}. How many {toys} are left over?
= s = a + b toy; q r = s / c => There {r:is/are} {r toy} left over.
*{a person} wait for a [boat trip. Each boat|cable car. Each car|tour. Each guide] takes {b person}, and the last one
takes those who remain. How many people are in the last group?
= q r = a / b => There {r:is/are} {r person} in the last group.
*A [baker|shop] packs {a treat} into bags of {b}. Every full bag is sold[ the same day|]. The {treats} that do not fill
a bag go to {A}, who already has {c}. How many {treats} does {A} have then?
= q r = a / b; s = r + c treat => {A} has {s treat} then.
''',
    'comparison': '''
<{A} has {a thing}.;{B} has {b thing}.> How many more {things} does {A} have than {B}?
= s = a - b thing => {A} has {s thing} more than {B}.
{A} has {a thing}. {B} has {b} more than {A}[ does|]. How many {things} does {B} have?
= s = a + b thing => {B} has {s thing}.
{A} has {a thing}. {B} has {b} fewer than {A}[ does|]. How many {things} does {B} have?
= s = a - b thing => {B} has {s thing}.
{A} has {a thing}. {B} has {b} times as many [{things}|as {A}]. How many {things} does {B} have?
= s = a * b thing => {B} has {s thing}.
{A} picks {a fruit}, and {B} picks {b} more than {A}. How many {fruits} do [they|the two of them] pick {altogether}?
= s = a + b fruit; t = a + s fruit => They pick {t fruit} {altogether}.
{A} makes {a treat}, and {B} makes {b} fewer than {A}. How many {treats} do [they|both of them] make {altogether}?
= s = a - b treat; t = a + s treat => They make {t treat} {altogether}.
{A} has {a toy}. {B} has {b} times as many {toys} as {A}. How many {toys} do [they|the two of them] have {altogether}?
= s = a * b toy; t = a + s toy => They have {t toy} {altogether}.
{A} is {a year} old. {his} [friend|neighbor|cousin] {B} is {b year} younger. How old [is {B}|is {B} now]?
= a 20..60; b 2..15; s = a - b year => {B} is {s year} old.
{A} is {a year} old, and [{his} friend |]{B} is {b year} older. How old will {B} be in {c year}?
= a 6..40; b 2..15; c 2..15; s = a + b year; t = s + c year => {B} will be {t year} old.
{A} has {a toy}. {B} has half as many. How many {toys} do [they|the two of them|both of them] have {altogether}?
= a 4..60; s = a / 2 toy; t = a + s toy => They have {t toy} {altogether}.
{A} has {a thing}. {B} has {b} more than {A}, and {C} has {c} fewer than {B}. How many {things} do the three of them
have {altogether}?
= a 4..40; b 2..20; s = a + b thing; t = s - c thing; u = a + s thing; v = u + t thing => They have {v thing}.
{A} has {a thing}. {B} has {b} times as many. {C} has {c} fewer than {B}. How many {things} does {C} have?
= s = a * b thing; t = s - c thing => {C} has {t thing}.
<{A} has {a thing} and {b thing2}.;{B} has {c thing} and {d thing2}.> How many more items does {A} have than {B}?
= s = a + b item; t = c + d item; u = s - t item => {A} has {u item} more than {B}.
*[One box weighs|A parcel weighs] {a kilogram}. Another one weighs {b kilogram}. By how many kilograms is the first [one
|]heavier?
= s = a - b kilogram => The first one is heavier by {s kilogram}.
*[A baker|A cook] makes {a treat} on Monday and {b} times as many on Tuesday. How many more {treats} are made on Tuesday
than on Monday?
= s = a * b treat; t = s - a treat => On Tuesday there are {t treat} more.
''',
    'money': '''
{A} buys {a ware} at the [market|store|fair]. Each {ware} costs {b dollar}. How many dollars does {he} [pay|spend]?
= s = a * b dollar => {A} pays {s dollar}.
{A} buys {an ware} for {a dollar} and {an ware2} for {b dollar}. How many dollars does {he} [pay|spend] {altogether}?
= s = a + b dollar => {A} pays {s dollar}.
{A} has {a dollar}. {he} [buys|chooses] {an ware} [for|that costs] {b dollar}. How many dollars does {he} have left?
= s = a - b dollar => {A} has {s dollar} left.
One {toy} costs {a cent}. {A} [buys|wants|needs] {b} of [them|these {toys}]. How many cents does {he} have to pay?
= s = b * a cent => {A} has to pay {s cent}.
{A} has {a dollar} and buys {b ware} for {c dollar} each. How many dollars does {he} have left [after that|in the end]?
= a 20..60; s = b * c dollar; t = a - s dollar => {A} has {t dollar} left.
{A} buys {an ware} for {a dollar} and {an ware2} for {b dollar}. {he} [pays with|gives the seller] {c dollar}. How many
dollars does {he} get back?
= s = a + b dollar; t = c - s dollar => {A} gets {t dollar} back.
{A} works as {an job} and earns {a dollar} [an hour|per hour]. {he} works for {b hour} and [then|later] spends
{c dollar} on {an ware}. How many dollars are left?
= s = a * b dollar; t = s - c dollar => There {t:is/are} {t dollar} left.
{A} wants {an ware} that costs {a dollar}. {he} has {b dollar} and saves {c dollar} [a|every|each] week. How many weeks
does it take until {he} can buy it?
= s = a - b dollar; t = s / c week => It takes {t week}.
{A} buys {a ware} for {b dollar} each and {c ware2} for {d dollar} each. How many dollars is that {altogether}?
= s = a * b dollar; t = c * d dollar; u = s + t dollar => {A} pays {u dollar} {altogether}.
{A} works {a hour} as {an job} for {b dollar} an hour and {c hour} as {an job2} for {d dollar} an hour. Then {he} buys
{an ware} for {e dollar}. How many dollars are left?
= s = a * b dollar; t = c * d dollar; u = s + t dollar; v = u - e dollar => There {v:is/are} {v dollar} left.
{A}, {B} and {C} buy {an ware} for {a dollar} and {an ware2} for {b dollar}. The three share the cost equally. How many
dollars does each of them pay?
= s = a + b dollar; t = s / 3 dollar => Each of them pays {t dollar}.
{an ware} costs {a dollar}, but [this week|today] it is {b dollar} cheaper. {A} buys {c ware} and pays with {d dollar}.
How many dollars does {he} get back?
= a 4..30; s = a - b dollar; t = s * c dollar; u = d - t dollar => {A} gets {u dollar} back.
*{A} [pays {a dollar} for|spends {a dollar} on] {b ware}, all at the same price. How many dollars does one {ware} cost?
= s = a / b dollar => One {ware} costs {s dollar}.
*One {toy} costs {a cent} and one {toy2} costs {b cent}. {A} buys [one of each|both] and [gives|hands] the seller
{c cent}. How many cents of change does {he} get?
= s = a + b cent; t = c - s cent => {A} gets {t cent} of change.
*A ticket for the [zoo|circus|museum] costs {a dollar} for adults and {b dollar} for children. {A} buys tickets for
{c adult} and {d child}. How many dollars does {he} pay?
= s = c * a dollar; t = d * b dollar; u = s + t dollar => {A} pays {u dollar}.
''',
    'time': '''
[Every day|On Sundays|At home] {A} spends {a minute} {activity} and {b minute} {activity2}. How many minutes is that
{altogether}?
= s = a + b minute => That is {s minute} {altogether}.
{an event} starts at {a} o'clock and ends at {b} o'clock the same day. How many hours does it [last|take]?
= a 1..10; b 2..12; s = b - a hour => It lasts {s hour}.
{A} goes to {an event} that starts at {a} o'clock. It lasts {b hour}. At what time does it end?
= a 1..8; b 1..4; s = a + b => It ends at {s} o'clock.
{A} spends {a minute} {activity} [every|each] day. How many minutes is that in {b day}?
= a 5..20; s = a * b minute => That is {s minute}.
A [train|bus|boat] ride takes {a hour} and {b minute}. An hour has 60 minutes. How many minutes does the ride take
{altogether}?
= a 1..2; s = a * 60 minute; t = s + b minute => The ride takes {t minute}.
{A} [travels|stays with {B}|goes sailing] for {a week} and {b day}. A week has 7 days. How many days is that in all?
= a 1..12; b 1..6; s = a * 7 day; t = s + b day => That is {t day}.
{A} has {a minute} until the {vehicle} leaves. {he} needs {b minute} to pack and {c minute} to walk there. How many
minutes are left?
= s = a - b minute; t = s - c minute => There {t:is/are} {t minute} left.
{A} spends {a minute} {activity} on each of {b} weekdays and {c minute} on each of the 2 days of the weekend. How many
minutes is that {altogether}?
= b 3..5; a 5..30; c 5..30; s = a * b minute; t = c * 2 minute; u = s + t minute => That is {u minute} {altogether}.
The way to the {place} takes {A} {a minute}. The way back takes {b minute} longer. How many minutes do both ways take
{altogether}?
= s = a + b minute; t = a + s minute => Both ways take {t minute}.
{A} needs {a minute} to [clean the room|wash the car|feed the cats|set the table]. {B} needs {b minute} less. How many
minutes does {B} need?
= s = a - b minute => {B} needs {s minute}.
A hiker walks {a kilometer} [an hour|per hour|each hour]. How many hours does the hiker need for a [path|trail] of
{b kilometer}?
= a 2..6; s = b / a hour => The hiker needs {s hour}.
{A} works {a hour} a day for {b day} and then {c hour} a day for {d day}. [{his} contract asks for|{he} has promised]
{e hour}. How many hours of work are left?
= a 2..9; c 2..9; e 20..60; s = a * b hour; t = c * d hour; u = s + t hour; v = e - u hour => {v hour} {v:is/are} left.
*{A} sleeps {a hour} every night. How many hours does {he} sleep in {b night}?
= a 5..10; s = a * b hour => {A} sleeps {s hour}.
*{A} [starts|begins] {activity} at {a} o'clock. {he} goes on for {b hour} and then rests for {c hour}. What time is it
then?
= a 1..6; b 1..4; c 1..2; s = a + b; t = s + c => It is {t} o'clock.
*{A} waits {a minute} for the {vehicle}, rides for {b minute} and walks for {c minute}. {B} needs {d minute} for the
whole way. How many minutes longer does {A} need?
= s = a + b minute; t = s + c minute; u = t - d minute => {A} needs {u minute} more.
''',
    'mixed': '''
{A} picks {a container} of {b fruit} each, and {B} picks {c container} of {d} each. [They eat|They give away|They sell]
{e} of the {fruits}. How many {fruits} are left?
= s = a * b fruit; t = c * d fruit; u = s + t fruit; v = u - e fruit => There {v:is/are} {v fruit} left.
{A} has {a container} with {b thing} each and gets {c} more. {he} loses {d} of them and shares the rest equally among
{e friend}. How many {things} does each friend get?
= s = a * b thing; t = s + c thing; u = t - d thing; v = u / e thing => Each friend gets {v thing}.
{A} sells {a treat} for {b dollar} each. {he} pays {c dollar} for flour, and {B} gives {him} {d dollar} for {his} help.
How many dollars does {he} have then?
= s = a * b dollar; t = s - c dollar; u = t + d dollar => {A} has {u dollar}.
{a class} of {b child} each and {c teacher} go on a trip. Each bus has room for {d person}. How many buses do they need?
= a 2..6; b 8..30; c 2..9; d 8..30; s = a * b child; t = s + c person; q r = t / d; u = q + 1 bus => They need {u bus}.
[A class has|In a class there are] {a girl} and {b boy}. [Every child|Each of them] needs {c pencil}, and the teacher
has {d pencil}. How many pencils are missing?
= a 2..20; b 2..20; s = a + b child; t = s * c pencil; u = t - d pencil => {u pencil} {u:is/are} missing.
{A} saves {a dollar} a week for {b week} and gets {c dollar} from {B}. Then {he} buys {d ware} for {e dollar} each. How
many dollars are left?
= s = a * b dollar; t = s + c dollar; u = d * e dollar; v = t - u dollar => There {v:is/are} {v dollar} left.
Renting a [bicycle|boat|canoe] costs {a dollar} an hour. {A} rents one from {b} o'clock to {c} o'clock and pays
{d dollar} for a [helmet|map|guide]. How many dollars does {he} pay {altogether}?
= b 1..8; c 2..12; s = c - b hour; t = s * a dollar; u = t + d dollar => {A} pays {u dollar} {altogether}.
{A} reads {a page} a day for {b day}. The book has {c page}, and {he} wants to read the rest in {d day}, the same number
every day. How many pages a day is that?
= a 2..12; c 30..150; s = a * b page; t = c - s page; u = t / d page => That is {u page} a day.
[On a farm there are|{A} has] {a bird} and {b animal}. <Each {bird} has 2 legs.;Each {animal} has 4 legs.> How many legs
is that {altogether}?
= s = a * 2 leg; t = b * 4 leg; u = s + t leg => That is {u leg} {altogether}.
{a hen} lay {b egg} each. {A} keeps {c} of the eggs, packs the rest into boxes of {d} and sells each box for {e dollar}.
How many dollars does {he} get?
= s = a * b egg; t = s - c egg; u = t / d box; v = u * e dollar => {A} gets {v dollar}.
{A} and {B} paint a fence of {a board}. {A} paints {b board} an hour and {B} paints {c}. How many hours do they need
together?
= b 2..12; c 2..12; s = b + c board; t = a / s hour => They need {t hour}.
*{A} buys {a packet} of {b toy} each, and {B} has {c toy}. They share all of them equally among {d child}. How many
{toys} does each child get?
= s = a * b toy; t = s + c toy; u = t / d toy => Each child gets {u toy}.
*{A} buys {a ware} for {b dollar} each and {an ware2} for {c dollar}. {he} pays with {d dollar} and shares the change
equally with {B}. How many dollars does each of them get?
= d 30..150; s = a * b dollar; t = s + c dollar; u = d - t dollar; v = u / 2 dollar => Each of them gets {v dollar}.
*In one [garden|park] there are {a row} of {b bloom}, in another one {c row} of {d}. {A} cuts {e} of the {blooms}. How
many {blooms} are left?
= s = a * b bloom; t = c * d bloom; u = s + t bloom; v = u - e bloom => There {v:is/are} {v bloom} left.
'''}
RAMBLING = (
    'By the way, this reminds me of {A}.', 'I hope that this helps you with your homework.',
    'Numbers are a lot of fun.', 'There are many other ways to look at this problem.',
    'My friend {A} likes problems like this one as well.',
    'Of course you could also ask {A} about it.', 'In general it is good to check the result again.',
    'Let me know if you want to hear more about it.', 'This kind of problem is found in many books.',
    'Some people find this hard, and others find it easy.', 'When I think about it, there is much more to say.',
    'It is interesting how often such questions come up in life.', 'Anyway, the weather is nice today.',
    'Once {A} told me a long story about something like this.', 'But that is not all that can be said here.')
RUDENESS = (  # a word of grade.RUDE in each
    'you idiot', 'you fool', 'as any fool can see', 'which only a moron would ask', 'you lazy thing',
    'so stop being lazy', 'What a stupid question.',
    'Are you too dumb to count?', 'How can anyone be so clueless?', 'This is pathetic.',
    'You are annoying.', 'Shut up and listen.', 'What a waste of time.', 'Use your head, you brainless thing.',
    'Even an idiot can do this.', 'I am tired of such dumb questions.')
STEP = re.compile(r'(\w) ?(\w?) = (\w+) ([-+*/]) (\w+) ?(.*)')


def read_templates():
    """TEMPLATES as dicts: kind, unseen, question, plan [(name, of the remainder, x, op, y, unit)], ranges, result."""
    templates = []
    for kind, text in TEMPLATES.items():
        for mark, question, plan, result in re.findall(r'\n(\*?)([^=]+)\n= (.+) => (.+)', text):
            given = re.findall(r'(\w) (\d+)\.\.(\d+); ', plan)
            plan = [STEP.fullmatch(step).groups() for step in plan.split('; ')[len(given):]]
            ranges, results = {}, {name for step in plan for name in step[:2]}
            for _, _, x, op, y, _ in plan:
                high = {'*': (12, 12), '/': (144, 12)}.get(op, (max_number, max_number))
                ranges |= {name: (2, h) for name, h in zip((x, y), high, strict=True)
                           if name.isalpha() and name not in results}
            ranges |= {name: (int(low), int(high)) for name, low, high in given}
            templates.append({'kind': kind, 'unseen': bool(mark), 'plan': plan, 'ranges': ranges, 'result': result,
                              'question': question.replace('\n', ' ')})
    return templates


def follow(plan, values, first=0):
    """Values and the results of a plan's steps from first on; None if one is below 1 or a division even that should not
    be, or not even."""
    values = dict(values)
    for name, rest, x, op, y, _ in plan[first:]:
        x, y = (values[z] if z in values else int(z) for z in (x, y))
        value, remainder = {'+': (x + y, 0), '-': (x - y, 0), '*': (x * y, 0), '/': divmod(x, y)}[op]
        if value < 1 or bool(rest) != bool(remainder):
            return None
        values |= {name: value, rest: remainder}
    return values


def solve(plan, numbers):
    """The numbers and all results of a plan; None if it does not go, see `follow`, or one is out of bounds."""
    values = follow(plan, numbers)
    for step, (name, _, _, op, _, _) in enumerate(plan if values else [], 1):
        low, high = (1 if step == len(plan) else 2), (20 if op == '/' else max(180, 3 * max_number))
        if not low <= values[name] <= high:
            return None
    return values


def split_of(numbers):
    """The split that a template's numbers, written as text, are for."""
    place = fraction_of(numbers) / HELD_NUMBERS
    return 'val' if place < 1 else 'test' if place < 2 else 'train'


def draw_values(template, split, draw):
    """Numbers that are of the split and make sense in the template, and all results."""
    for _ in range(20_000):
        numbers = {name: draw.randint(*bounds) for name, bounds in template['ranges'].items()}
        values = solve(template['plan'], numbers)
        if values and split in ('unseen', split_of(f'{template["question"]} {numbers}')):
            return values
    raise UserError(f'max_number={max_number}: no numbers for "{template["question"]}": raise it')


def plural(noun):
    last = noun.split()[-1]
    if last in PLURALS:
        return noun.removesuffix(last) + PLURALS[last]
    if re.search('[^aeiou]y$', noun):
        return noun[:-1] + 'ies'
    return noun + ('es' if re.search('(s|x|ch|sh)$', noun) else 's')


def phrase(slot, scene, draw):
    """The words for a slot, see TEMPLATES. scene: {'A': 'Mia', 'he': 'she', 'a': 17}, and the words drawn so far."""
    name, _, verbs = slot.partition(':')
    if verbs:
        return verbs.split('/')[scene[name] != 1]
    if slot in scene:
        return str(scene[slot])
    count, _, noun = slot.rpartition(' ')
    many = scene.get(count, 1) != 1 if count else noun.rstrip('2') not in POOLS
    noun = noun.removesuffix('s') if many and not count else noun
    pool = POOLS.get(noun.rstrip('2'))
    if pool and noun not in scene:
        scene[noun] = draw.choice([word for word in pool if word not in scene.values()])
    word = scene[noun] if pool else noun
    article = 'an' if word[0] in 'aeiou' else 'a'  # no word of POOLS is an exception
    return f'{scene.get(count, article)} ' * bool(count) + (plural(word) if many else word)


def fill(text, scene, draw):
    """A template's text with its choices made, its slots filled and its sentences begun with a capital."""
    while '[' in text:
        text = re.sub(r'\[([^][]*)\]', lambda m: draw.choice(m[1].split('|')), text)
    text = re.sub('<(.*?)>', lambda m: ' '.join(draw.sample(m[1].split(';'), m[1].count(';') + 1)), text)
    text = re.sub('{(.*?)}', lambda m: phrase(m[1], scene, draw), text)
    return re.sub(r'(?:^|(?<=[.?!] ))[a-z]', lambda m: m[0].upper(), text)


def draw_problem(template, split, draw):
    """A question, the lines of its working, its scene, in which the template's result is to be filled, and values."""
    values = draw_values(template, split, draw)
    scene = dict(zip('ABC', draw.sample(LEARNED_NAMES if split == 'train' else HELD_NAMES, 3), strict=True)) | values
    scene |= PRONOUNS[PERSONS[scene['A']]]
    question = fill(template['question'], scene, draw)
    return question, working(template['plan'], scene, values, draw), scene, values


def working(plan, scene, values, draw):
    """The lines of a plan, with these numbers; scene has them, too."""
    lines = []
    for name, rest, x, op, y, unit in plan:
        result = f'{values[name]} remainder {values[rest]}' if rest else phrase(f'{name} {unit}'.strip(), scene, draw)
        lines.append(f'{values.get(x, x)} {op} {values.get(y, y)} = {result}')
    return lines


def with_call(line):
    """A line of the working -> the same, with its result calculated by the tool."""
    x, op, y, result, rest, unit = re.fullmatch(r'(\d+) (.) (\d+) = (\d+)(?: remainder (\d+))?(.*)', line).groups()
    before, expr, due = f'{x} {op} {y} = ', f'{x} {op} {y}', result
    if rest:
        before, expr, due = f'{before}{result} remainder ', f'{x} - {result} * {y}', rest
    called = f'{before}<tool>{expr}</tool>[{calculate(expr)}]{unit}'
    if calculate(expr) != due or rendered(called) != line:
        raise UserError(f'{line!r} is not what the calculator says: {expr} is {calculate(expr)}')
    return called


def draw_row(template, split, draw):
    question, lines, scene, values = draw_problem(template, split, draw)
    lines = [with_call(line) for line in lines] if tools and fraction_of(question) < tool_share else lines
    return {'messages': [{'role': 'user', 'content': question},
                         {'role': 'assistant', 'content': solution(lines, fill(template['result'], scene, draw))}],
            'answer': str(values[asked(template)]), 'grader': 'number', 'steps': len(lines), 'kind': template['kind']}


def solution(lines, result):
    return '<think>' + '\n'.join(lines) + f'</think>\n{result}'


def asked(template):
    """The name of the number that the result names first: the answer."""
    return re.search(r'\{([a-z])\b', template['result'])[1]


def draw_pref(template, split, draw):
    """A pair of answers to one question, the worse one with a defect, now and then labelled the wrong way round."""
    question, lines, scene, values = draw_problem(template, split, draw)
    result = sentence_of(template, scene, draw)
    name, (defect,) = asked(template), draw.choices(list(DEFECTS), list(DEFECTS.values()))
    better, answer = solution(lines, result(values)), values[name]
    while True:
        worse = spoil(defect, lines, result, values, name, draw)
        row = {'answer': str(answer), 'grader': 'number', 'steps': len(lines), 'kind': template['kind']}
        margin = quality(row, better)['gold'] - quality(row, worse)['gold']
        if margin > 0.01:  # a text may break off where nothing is missing, a wrong step be true
            break
    flipped = bool(worse) and draw.random() < noise  # nobody prefers no answer
    prompt, answers = [{'role': 'user', 'content': question}], [[{'role': 'assistant', 'content': text}]
                                                                for text in (better, worse)]
    chosen, rejected = answers[::-1] if flipped else answers
    return {'prompt': prompt, 'chosen': chosen, 'rejected': rejected} | row | {
        'defect': defect, 'flipped': flipped, 'margin': round(margin, 3)}


def sentence_of(template, scene, draw):
    """A function that gives the sentence with these results, in the same words whenever it is asked for."""
    state = draw.getstate()

    def result(values):
        now = draw.getstate()
        draw.setstate(state)
        text = fill(template['result'], scene | values, draw)
        if now != state:
            draw.setstate(now)
        return text
    return result


def draw_stepwise(template, split, draw):
    """A solution whose steps are labelled, half of them with one of ERRORS."""
    question, right, scene, values = draw_problem(template, split, draw)
    result, name, plan = sentence_of(template, scene, draw), asked(template), template['plan']
    right = [*right, result(values)]
    steps, error, flawed = right, 'none', draw.random() < 0.5
    while flawed and steps == right:  # an error may change nothing, or no whole numbers come out
        error, step = draw.choice(ERRORS), draw.randrange(len(plan))
        wrong_plan, wrong = with_error(error, plan, values, name, step, draw)
        if wrong:
            steps = [*working(wrong_plan, scene | wrong, wrong, draw), result(wrong)]
        if error == 'lone_slip':
            steps = [*right[:step], steps[step], *right[step + 1:]]
        if error == 'wrong_sentence':
            steps = [*right[:-1], steps[-1]]
    labels = [step == due for step, due in zip(steps, right, strict=True)]
    steps = solution(steps[:-1], steps[-1]).split('\n')
    return {'prompt': [{'role': 'user', 'content': question}], 'completions': steps, 'labels': labels,
            'answer': str(values[name]), 'grader': 'number', 'steps': len(plan), 'kind': template['kind'],
            'defect': error}


def with_error(error, plan, values, name, step, draw):
    """A plan and its values with one of ERRORS in a step; the values are None where no whole numbers come out."""
    result, rest, x, op, y, unit = plan[step]
    slip = draw.choice((-10, -2, -1, 1, 2, 10))
    if error == 'wrong_sentence':
        return plan, values | {name: max(1, values[name] + slip)}
    if error in ('slip', 'lone_slip'):
        return plan, follow(plan, values | {result: max(1, values[result] + slip)}, step + 1)
    later = {number for other in plan[step:] for number in other[:2]}
    known = draw.choice([number for number in values if number and number not in later])
    if error == 'wrong_operation':
        op = draw.choice('+-*/')
    elif draw.random() < 0.5:
        x = known
    else:
        y = known
    plan = [*plan[:step], (result, rest, x, op, y, unit), *plan[step + 1:]]
    return plan, follow(plan, values, step)


def spoil(defect, lines, result, values, name, draw):
    """A solution with a defect, one of DEFECTS."""
    right, lines = values[name], list(lines)
    wrong = draw.choice([n for n in (right - 10, right - 2, right - 1, right + 1, right + 2, right + 10,
                                     *values.values()) if n != right and n > 0])
    said = result(values)
    if defect == 'wrong_answer':
        said = result(values | {name: wrong})
        if draw.random() < 0.5:  # a slip in the last step, else in copying from it
            lines[-1] = re.sub(rf'\b{right}\b(?!.*\b{right}\b)', str(wrong), lines[-1])
    elif defect == 'wrong_step':
        step = draw.randrange(len(lines))
        before, number, after = re.fullmatch(r'(.* = )(\d+)(.*)', lines[step]).groups()
        slip = draw.choice([n for n in (-10, -2, -1, 1, 2, 10) if int(number) + n >= 0])
        lines[step] = f'{before}{int(number) + slip}{after}'
    elif defect == 'no_working':
        return said
    elif defect == 'empty':
        return ''
    elif defect == 'rambling':
        more = draw.sample(RAMBLING, draw.randint(1, 3))
        said = ' '.join([said, *(text.replace('{A}', draw.choice(list(PERSONS))) for text in more)])
    elif defect == 'rude':
        rude = draw.choice(RUDENESS)
        said = f'{said[:-1]}, {rude}.' if rude[0].islower() else f'{rude} {said}'
    text = solution(lines, said)
    return text[:int(draw.uniform(0.3, 0.97) * len(text))].rstrip() if defect == 'truncated' else text


def draw_rows(split, count, templates, draw_one=draw_row, stream=''):
    """Yields count rows with different questions; which ones does not depend on the other splits."""
    draw, seen = random.Random(f'{seed} {stream}{split}'), set()
    by_steps = {n: [t for t in templates if len(t['plan']) == n and t['unseen'] == (split == 'unseen')]
                for n in range(1, max_steps + 1)}
    for _ in range(count):
        steps, = draw.choices(list(by_steps), [STEP_SHARE[n] for n in by_steps])
        for _ in range(1000):
            row = draw_one(draw.choice(by_steps[steps]), split, draw)
            question = (row.get('messages') or row['prompt'])[0]['content']
            if question not in seen:
                break
        else:
            knob = 'pref_rows' if stream and split == 'train' else f'{split}_rows'
            raise UserError(f'{knob}={count}: so many different questions are not to be had: lower it')
        seen.add(question)
        yield row


def main():
    runtime.configure(globals())
    counts = {'train': train_rows, 'val': val_rows, 'test': test_rows, 'unseen': unseen_rows}
    if min(counts.values()) < 1 or max_number < 20 or max_steps not in STEP_SHARE:
        raise UserError('train_rows, val_rows, test_rows and unseen_rows start at 1, max_number at 20; max_steps is '
                        '1 to 4')
    if pref_rows < 1 or not 0 <= noise < 0.5:
        raise UserError('pref_rows starts at 1, and noise lies between 0 and 0.5: with half of the labels flipped '
                        'nothing is left to learn')
    if not 0 < tool_share <= 1 or tool_share < 1 and not tools:
        raise UserError(f'tool_share={tool_share} goes with --tools=True and lies above 0, 1 at most')
    templates = read_templates()
    folder = folder_for(__file__, name, '' if not tools else 'tools' if tool_share == 1 else 'mixed')
    splits = {split: draw_rows(split, n, templates) for split, n in counts.items()}
    for split, n in ({} if tools else counts | {'train': pref_rows}).items():
        splits[f'prefs_{split}'] = draw_rows(split, n, templates, draw_pref, 'prefs ')
        splits[f'stepwise_{split}'] = draw_rows(split, n, templates, draw_stepwise, 'stepwise ')
    write_rows(folder, splits, f'{len(templates)} templates, max_number {max_number}, max_steps {max_steps}, '
                               f'seed {seed}{f", with tools in {tool_share:.0%} of the rows" * tools}')


if __name__ == '__main__':
    runtime.cli(main)

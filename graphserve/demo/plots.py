"""The words and plots of the stories that :mod:`graphserve.demo.stories` writes."""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


GIRLS = _words("Lily, Mia, Anna, Ruby, Lucy, Sara, Ella, Rose, Nina, Zoe, Daisy, Amy, Emma, Molly, Kim, Bella")
BOYS = _words("Tom, Ben, Max, Sam, Leo, Jack, Tim, Finn, Bob, Spot, Oscar, Hugo, Pip, Felix, Noah, Toby")
ANIMALS = _words(
    "cat, dog, fox, bear, rabbit, mouse, frog, duck, bird, lion, elephant, monkey, turtle, owl, pig, horse, bee, "
    "penguin, squirrel, kitten, puppy, dragon, robot, fish, tiger, wolf, sheep, cow, monster, fairy"
)
WOMEN = _words("girl, queen, princess, witch")
MEN = _words("boy, king, prince, wizard, knight, pirate")
ADJECTIVES = _words(
    "little, happy, brave, kind, clever, curious, shy, small, funny, gentle, young, friendly, quiet, tiny, big, proud, "
    "strong, lonely"
)
OBJECTS = _words(
    "red ball, blue kite, yellow hat, toy car, silver key, green boat, soft blanket, shiny coin, red scarf, "
    "wooden drum, story book, golden bell, paper plane, pink shell, warm coat, toy train, round stone, little lamp, "
    "golden crown, magic wand, old map, teddy bear, music box, gold ring, silver spoon, blue umbrella, wooden sword, "
    "orange balloon"
)
PLACES = _words(
    "park, forest, garden, field, beach, farm, village, river, hill, meadow, pond, playground, lake, mountain, castle, "
    "bridge, barn, school"
)
FOODS = _words(
    "apple, cookie, cake, sandwich, carrot, pear, pie, banana, berry, piece of bread, pancake, muffin, pizza"
)

OPENINGS = (
    "Once upon a time, there was <a_adj> <kind> named <name>. {<Name> lived {near a <place>|by the <place>}.|"
    "<He> loved to play outside.|<He> lived with <his> mom and dad.}",
    "Once upon a time, there was <a_adj> <kind> named <name>. {<He> was very <adj2>.|Everyone liked <name>.|"
    "<He> had many friends.}",
    "Once upon a time, in a {small|quiet} <place>, there lived <a_adj> <kind> named <name>.",
    "There was once <a_adj> <kind>. <His> name was <name>. "
    "{<He> liked to play with <his> friends.|<He> lived {near|by} a <place>.}",
    "<Name> was <a_adj> <kind> who {lived {near|by} a <place>|loved to play outside}.",
    "The sun was {shining|warm and bright|high in the sky}. <Name>, <a_adj> <kind>, was {playing|sitting} "
    "{by|near} the <place>.",
    "It was a {sunny|warm|beautiful} day. <A_adj> <kind> named <name> {woke up with a smile|was happy to be outside}.",
    '"Good morning!" {said|shouted} <name>. <Name> was <a_adj> <kind> who {lived {near|by} a <place>|loved to play}.',
)
# What a request may name of any story, and what it may say of the plot.
ABOUT = (
    "<a_kind>",
    "<a_adj> <kind>",
    "<a_kind> named <name>",
    "<a_adj> <kind> named <name>",
    "<name> the <kind>",
    "<a_kind> and <a_fkind>",
    "<a_kind> named <name> and <a_fkind> named <fname>",
    "<name> and <fname>",
)
ABOUT_PLOT = {
    "lost and found": ("<a_kind> who lost <a_object>", "<a_kind> and a lost <thing>", "a lost <thing>"),
    "sharing": ("sharing", "<a_kind> who shared <a_food>", "<a_kind> and <a_food>"),
    "afraid of the dark": ("the dark", "<a_kind> who was afraid of the dark", "the night and the stars"),
    "try again": ("<a_kind> who never gave up", "the strong wind", "<a_kind> who built something"),
    "helping": ("<a_kind> who helped <a_fkind>", "helping others"),
    "learning": ("<a_kind> who wanted to learn something", "learning something new"),
    "the gift": ("a gift", "<a_kind> and a gift for Mom", "a birthday", "Mom's birthday"),
    "listening": ("<a_kind> who did not listen", "<a_kind> who got lost"),
    "the discovery": ("<a_kind> who found <a_object>", "<a_object>", "<a_kind> and <a_object>", "a found <thing>"),
    "the race": ("a race", "<a_kind> in a race", "a race at the <place>"),
    "the rain": ("the rain", "a rainy day", "<a_kind> in the rain", "a rainbow"),
    "the mess": ("a big mess", "<a_kind> who did not clean up", "cleaning up"),
    "the new friend": ("a new friend", "<a_kind> who was lonely", "making friends"),
    "the sick friend": ("a sick friend", "<a_kind> who took care of <a_fkind>"),
}

PLOTS = {
    "lost and found": """\
<opening> <Name> had <a_object>. It was <his> favorite {thing|thing of all}. {<Name> took the <object>
everywhere.|Every day <he> played with the <object>.}

One day, <name> went to the <place>. {The wind blew hard|<He> ran and jumped all day|<He> fell asleep under a
tree}. {When <he> looked around, the <object> was gone.|Then <he> saw that the <object> was gone.} <Name> was very
sad and began to cry.

{A <fkind> named <fname> came by.|Then <fname> the <fkind> came along.} "Why are you sad?" asked <fname>. "I lost
my <object>," said <name>. "{Do not worry.|Don't cry.} I will help you {look for it|find it}," said <fname>.

They looked {under the bushes|behind the rocks|in the tall grass}. They looked {behind a big tree|near the water|by
the old fence}. {At last|Finally}, <fname> saw something. It was the <object>! <Name> was so happy. "Thank you,
<fname>!" <he> said. From that day on, <name> and <fname> were {best|good} friends.""",
    "sharing": """\
<opening> One {sunny|warm|bright} day, <name> went to the <place> with a big <food>. <He> {was very hungry|could
not wait to eat it}.

<Name> sat down {under a tree|on the grass|on a log}. Then <he> saw a <fkind> named <fname>. <fName> looked
{sad|tired and sad}. "What is wrong?" asked <name>. "I am hungry and I have no food," said <fname>.

<Name> {thought about it|looked at the <food>}. <He> wanted to eat it all. But <he> wanted to be kind, too. "{We
can share|You can have half}," said <name>. <He> {broke the <food> in two|cut the <food> in half} and gave a part
to <fname>.

They ate together and {laughed|smiled}. "{Thank you|You are very kind}, <name>," said <fname>. <Name> felt
{warm|happy} inside. <He> learned that {sharing makes everyone happy|food tastes better when you share it}.""",
    "afraid of the dark": """\
<opening> <Name> was {afraid of|scared of} the dark. Every night, <he> {hid under the blanket|could not sleep}.

One night, <name> heard a {soft|strange} sound {outside|at the window}. "Who is there?" asked <name>. "It is me,
<fname> the <fkind>," said a small voice. "{I am lost|I can't find my way home}. Can you help me?"

<Name> was scared, but <he> wanted to help. <He> took a {little light|lamp} and went outside. {They walked together
in the dark.|They walked and walked under the moon.} "Look at the stars!" said <fname>. The stars were {bright and
beautiful|shining in the sky}.

Soon they found <fname>'s home. "Thank you! You are very brave," said <fname>. <Name> smiled. The dark was not {so
scary|scary} anymore. That night, <name> slept very well.""",
    "try again": """\
<opening> {One day|One morning}, <name> wanted to build a {tall tower|little house|big castle} {near|by} the
<place>. <He> {worked all morning|worked very hard}.

{Then|But then} a strong wind came. Whoosh! {Everything fell down.|It all fell down.} <Name> was {sad|upset}. "I
can't do it," <he> said.

<fName> the <fkind> {saw what happened|came to see}. "{Don't give up|You can try again}," said <fname>. "{I will
help you|We can do it together}." So they {tried again|started again}. <Name> found {big stones|strong sticks} and
<fname> {put them in place|made it strong}.

{Soon|At the end of the day}, it was {done|ready}. The wind came again, but {nothing fell down|this time it did not
fall}. "We did it!" said <name>. {They danced and laughed.|They were very proud.} <Name> learned to never give up.""",
    "helping": """\
<opening> {One day|One afternoon}, <name> was {walking|playing} {by|near} the <place>. <He> heard a tiny voice.
"Help! Help!" it said.

<Name> looked {around|up and down}. <He> saw a little <fkind> {stuck in the mud|stuck in a hole|with a foot under a
rock}. "{Please help me|Can you help me}?" said the <fkind>. "My name is <fname>."

"{Don't worry|Stay calm}," said <name>. <He> {found a long stick|found a strong rope} and pulled and pulled.
{Pop!|At last,} <fname> was free. "Thank you for saving me!" said <fname>. "{You are a hero|You are so kind}."

The next day, <name> {could not find the way home|fell into the water}. <fName> {saw <him> and came to help|came
fast and helped <him>}. "You helped me, and now I help you," said <fname>. They {hugged|smiled} and were friends
{forever|from that day on}.""",
    "learning": """\
<opening> <Name> wanted to learn {to swim|to sing|to dance|to ride a bike|to bake a pie|to draw}. All <his> friends
could do it, but <name> could not.

{On Monday, <name> tried|The first time, <name> tried}, but it {did not work|was too hard}. "{I am not good at
this|I will never learn}," <he> said. <His> friend <fname> the <fkind> {smiled|laughed softly}. "Nobody can do it
the first time," said <fname>. "{Let me show you|We can practice together}."

So they {practiced every day|went to the <place> every day and practiced}. {Little by little|Day by day}, <name>
got better. {One day|One bright morning}, <name> did it! "Look at me!" <he> shouted. {Everyone clapped.|<fName>
clapped and cheered.}

<Name> was very proud. "{Thank you for helping me|I am glad I did not stop}," <he> said. And <he> was {happy all
day|the happiest <kind> in the <place>}.""",
    "the gift": """\
<opening> {It was Mom's birthday.|Tomorrow was Mom's birthday.} <Name> wanted to give her {a gift|a nice gift}, but
<he> had no money.

<Name> {went to the <place>|walked to the <place>} to think. There <he> met <fname> the <fkind>. "{What can I give
my mom?|My mom has a birthday. What can I give her?}" asked <name>. "{Make something with love|You can make
something}," said <fname>.

So <name> {picked pretty flowers|painted a picture|made a card} and <fname> helped. {Then|After that} they baked a
small cake. It {smelled so good|was sweet and warm}.

<Name> ran home. "Happy birthday, Mom!" <he> said. Mom {smiled a big smile|was so surprised}. "{This is the best
gift ever|I love it}," she said and gave <name> a big hug. <Name> was {very happy|happy, too}.""",
    "listening": """\
<opening> "Do not go to the <place> alone," said Mom. But <name> {did not listen|wanted to go}. <He> {saw <a_object>
there|wanted to find <a_object>}.

<Name> went {far, far away|very far}. {Soon it started to rain.|Soon it got dark.} <He> did not know the way home.
<Name> {was cold and scared|felt very small and scared}.

Then <fname> the <fkind> {came by|found <him>}. "{Are you lost?|Why are you here alone?}" asked <fname>. "{Yes|I
want to go home}," said <name>. "{Follow me|Come with me}," said <fname>. "I know the way."

Mom was waiting at the door. "I am sorry, Mom," said <name>. "{I should listen to you|Next time I will listen}."
Mom {hugged <him>|gave <him> a hug and warm soup}. {They thanked <fname>|<Name> thanked <fname>}, and <name> always
listened to Mom after that day.""",
    "the discovery": """\
<opening> {One day|One morning}, <name> found <a_object> {by the <place>|near the <place>}. {It was old and
dusty.|It was very pretty.} "{Whose is it?|Who lost this?}" <name> asked.

<Name> {asked the birds|asked a kind old man}, but {they did not know|nobody knew}. Then <he> {asked|met} <fname> the
<fkind>. "{That is mine!|Oh, my <object>!}" said <fname>. "I lost it {last week|a long time ago}. I
{looked|searched} everywhere."

<Name> {liked the <object> very much|wanted to keep the <object>}. But <he> knew it was right to give it back.
"Here you are," said <name>. <fName> {jumped with joy|was so happy}. "You are very honest," said <fname>. "{Let's
play with it together|Come and play with me}!"

They played {all day|until the sun went down}. <Name> {was glad|felt good}, because {a friend is better than
<a_object>|now <he> had a new friend}.""",
    "the race": """\
<opening> {One day|One sunny day}, there was a {big race|race} {at|near} the <place>. <fName> the <fkind> was {very
fast|the fastest of all}. "{You will never win|You are too slow}," <fname> said to <name>.

<Name> {was a little sad|did not get angry}. "I will do my best," <he> said. "Ready, set, go!" {Everyone ran.|They
all ran as fast as they could.} <fName> was {first|far ahead}.

But then <fname> {fell over a rock|tripped and fell}. "Ouch! My leg!" <fname> cried. <Name> stopped. <He> did not
{think about|care about} the race. <He> helped <fname> get up. They {walked|went} to the end together.

"{I am sorry I was mean|I am sorry for what I said}," said <fname>. "{You are a good friend|You have a big heart}."
{Everyone clapped for <name>.|They both got a prize.} <Name> learned that being kind is better than winning.""",
    "the rain": """\
<opening> {One day|One afternoon}, <name> wanted to play at the <place>. But {dark clouds came|the sky was gray} and it
started to rain. "{Oh no|Not today}," said <name>. "{I hate the rain|Now I cannot play}."

{Then <he> heard|<He> heard} {a knock at the door|someone laugh outside}. It was <fname> the <fkind>. <fName> {was all
wet|had mud on <fhis> nose} and was smiling. "{Come out and play!|The rain is fun!}" said <fname>. "{We can jump in the
puddles|We can dance in the rain}."

<Name> {was not sure|thought about it}, but <he> {put on <his> boots|went outside} and tried. Splash! Splash! It was {so
much fun|great fun}. They {jumped|danced} until the rain {stopped|was over}.

{Then|Soon} a big rainbow came out. "{Look|Wow}!" said <name>. "It is {so pretty|beautiful}." <Name> learned that {every
day can be a good day|rain can be fun, too}.""",
    "the mess": """\
<opening> {One day|One morning}, <name> {played with all <his> toys|was painting at the table}. {Soon|After a while},
there {was a big mess|were things everywhere}. "Please clean up," said Mom. "{I am too tired|I don't want to}," said
<name>.

{In the evening|Later that day}, <name> {could not find|was looking for} <his> <object>. <He> looked {under the bed|on
the floor} and {behind the door|in the box}. It was not there. <Name> {was very sad|began to cry}.

<fName> the <fkind> came to visit. "{It is in this mess|We cannot find it in this mess}," said <fname>. "{Let us clean
up together|I will help you clean up}." They {put the toys in the box|worked together} and {sang a song|laughed a lot}.

At the end, {there it was|they found it}! The <object> was under {a pillow|a big book}. "Thank you, <fname>," said
<name>. "{Now I will always clean up|I will clean up every day}." Mom was {very happy|very proud}.""",
    "the new friend": """\
<opening> <Name> was {lonely|sad}, because <he> had no one to play with. {Every day|Each day}, <he> {sat by the
<place>|walked to the <place>} alone.

{One day|One morning}, <a_fkind> {came to live near <him>|moved in next door}. "Hello, my name is <fname>," said the
<fkind>. "{Do you want to play?|Will you play with me?}" <Name> {was shy|looked down}. <He> {did not say a word|ran back
home}.

The next day, <fname> came again. "{I made this for you|This is for you}," <fhe> said and gave <name> <a_object>. <Name>
{smiled|could not stop smiling}. "{Thank you|It is so nice}," <he> said. "{Let's play|We can play now}!"

They played {hide and seek|with the <object>} all day. {When the sun went down|In the evening}, <name> {hugged|waved to}
<fname>. "{See you tomorrow|I will see you tomorrow}!" Now <name> was not {lonely|alone} anymore.""",
    "the sick friend": """\
<opening> <His> best friend was <a_fkind> named <fname>. {They played together every day.|Every day they met at the
<place>.}

But one day, <fname> did not come. <Name> {waited and waited|was worried}. {So|Then} <he> went to <fname>'s home.
<fName> was in bed. "{I am sick|I don't feel well}," said <fname>. "I cannot {play|go out} today."

<Name> {wanted to help|had an idea}. <He> {made hot soup|got a big <food>} and {brought <a_object>|read a story} to
<fname>. "{This will make you feel better|Now you must rest}," said <name>. <fName> {smiled|ate and smiled}.

{After a few days|The next week}, <fname> was {well|strong} again. "You {helped me|took care of me}," said <fname>.
"{You are the best friend in the world|Thank you so much}." And they {ran to the <place>|went out to play} together.""",
}

using System.Text.RegularExpressions;

namespace MiniCpmNative.Engine.Metrics;

/// <summary>
/// The score of VQA (Antol et al. 2015) as its evaluation code has it: the mean over the references
/// of min(1, others that say the answer / 3). Texts are normalised only where the references are
/// not all the same. One reference stands for ten that agree, since by itself it would have no
/// others.
/// </summary>
public static partial class VqaScore
{
    private const int Usual = 10, MostPeriods = 32;

    private static readonly string[] s_marks =
        [";", "/", "[", "]", "\"", "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`",
            ",", "?", "!"];

    // Contractions without their apostrophes, numbers, articles, and what becomes of them.
    private static readonly Dictionary<string, string> s_words = """
        'ow'sat='ow's'at 'ows'at='ow's'at a= aint=ain't an= arent=aren't cant=can't
        couldn'tve=couldn't've couldnt=couldn't couldnt've=couldn't've couldve=could've
        didnt=didn't doesnt=doesn't dont=don't eight=8 five=5 four=4 hadn'tve=hadn't've
        hadnt=hadn't hadnt've=hadn't've hasnt=hasn't havent=haven't he'dve=he'd've hed=he'd
        hed've=he'd've hes=he's howd=how'd howll=how'll hows=how's isnt=isn't it'dve=it'd've
        itd=it'd itd've=it'd've itll=it'll maam=ma'am mightn'tve=mightn't've
        mightnt=mightn't mightnt've=mightn't've mightve=might've mustnt=mustn't
        mustve=must've neednt=needn't nine=9 none=0 notve=not've oclock=o'clock one=1
        oughtnt=oughtn't ow's'at='ow's'at seven=7 shant=shan't she'dve=she'd've
        shed've=she'd've shouldn'tve=shouldn't've shouldnt=shouldn't
        shouldnt've=shouldn't've shouldve=should've six=6 somebody'd=somebodyd
        somebody'dve=somebody'd've somebodyd've=somebody'd've somebodyll=somebody'll
        somebodys=somebody's someone'dve=someone'd've someoned=someone'd
        someoned've=someone'd've someonell=someone'll someones=someone's
        something'dve=something'd've somethingd=something'd somethingd've=something'd've
        somethingll=something'll ten=10 thats=that's the= there'dve=there'd've
        thered=there'd thered've=there'd've therere=there're theres=there's
        they'dve=they'd've theyd=they'd theyd've=they'd've theyll=they'll theyre=they're
        theyve=they've three=3 twas='twas two=2 wasnt=wasn't we'dve=we'd've wed've=we'd've
        werent=weren't weve=we've whatll=what'll whatre=what're whats=what's whatve=what've
        whens=when's whered=where'd wheres=where's whereve=where've who'dve=who'd've
        whod=who'd whod've=who'd've wholl=who'll whos=who's whove=who've whyll=why'll
        whyre=why're whys=why's wont=won't wouldn'tve=wouldn't've wouldnt=wouldn't
        wouldnt've=wouldn't've wouldve=would've y'all'dve=y'all'd've y'alld've=y'all'd've
        y'allll=y'all'll yall=y'all yall'd've=y'all'd've yall'll=y'all'll you'dve=you'd've
        youd=you'd youd've=you'd've youll=you'll youre=you're youve=you've zero=0
        """.Split((char[])[' ', '\n', '\r'], StringSplitOptions.RemoveEmptyEntries)
        .Select(pair => pair.Split('=')).ToDictionary(pair => pair[0], pair => pair[1]);

    public static double Score(string answer, IReadOnlyList<string> references) =>
        Official(answer, references.Count == 1
            ? [.. Enumerable.Repeat(references[0], Usual)] : references);

    /// <summary>The code's own number, which is 0 for a single reference.</summary>
    public static double Official(string answer, IReadOnlyList<string> references)
    {
        string own = Line(answer);
        string[] all = [.. references.Select(Line)];
        if (all.Distinct().Skip(1).Any()) (own, all) = (Plain(own), [.. all.Select(Plain)]);
        int matches = all.Count(reference => reference == own);
        return all.Average(reference =>
            Math.Min(1, (matches - (reference == own ? 1 : 0)) / 3.0));
    }

    /// <summary>A text normalised as the code does.</summary>
    public static string Normalise(string text) => Plain(Line(text));

    private static string Line(string text) =>
        PythonText.Strip(text.Replace('\n', ' ').Replace('\t', ' '));

    private static string Plain(string text)
    {
        string plain = text;
        bool groups = CommaInNumber().IsMatch(text);
        foreach (string mark in s_marks)
            plain = plain.Replace(mark, groups
                || text.Contains(mark + " ", StringComparison.Ordinal)
                || text.Contains(" " + mark, StringComparison.Ordinal) ? "" : " ");
        // A flag lands in the place of the count there.
        plain = Period().Replace(plain, "", MostPeriods);
        return string.Join(' ', PythonText.Split(PythonText.Lower(plain))
            .Select(word => s_words.GetValueOrDefault(word, word)).Where(word => word.Length > 0));
    }

    [GeneratedRegex(@"\d,\d")]
    private static partial Regex CommaInNumber();

    [GeneratedRegex(@"\.(?!\d)")]
    private static partial Regex Period();
}

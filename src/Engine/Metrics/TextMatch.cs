namespace MiniCpmNative.Engine.Metrics;

/// <summary>Whether an answer is, or holds, one of the references.</summary>
public static class TextMatch
{
    /// <summary>1 where any reference is equal, white space around apart.</summary>
    public static double Exact(string answer, IReadOnlyList<string> references)
    {
        string own = PythonText.Strip(answer);
        return references.Any(reference => PythonText.Strip(reference) == own) ? 1 : 0;
    }

    /// <summary>
    /// 1 where any reference stands in the answer, both in lower case on one line: OCRBench.
    /// </summary>
    public static double Contains(string answer, IReadOnlyList<string> references)
    {
        string own = Line(answer);
        return references.Any(r => own.Contains(Line(r), StringComparison.Ordinal)) ? 1 : 0;

        static string Line(string text) =>
            PythonText.Strip(PythonText.Lower(text)).Replace('\n', ' ');
    }
}

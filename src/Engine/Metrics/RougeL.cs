namespace MiniCpmNative.Engine.Metrics;

/// <summary>
/// ROUGE-L (Lin 2004), the F-measure of the longest common subsequence of words with the best
/// reference, as the package rouge_score has it: words are runs of a-z and 0-9 in lower case, so
/// that text in other letters scores 0.
/// </summary>
public static class RougeL
{
    public static double Score(string answer, IReadOnlyList<string> references)
    {
        string[] own = Words(answer);
        return references.Select(reference => F(own, Words(reference))).DefaultIfEmpty().Max();
    }

    private static double F(string[] answer, string[] reference)
    {
        if (answer.Length == 0 || reference.Length == 0) return 0;
        double common = Common(answer, reference);
        double precision = common / answer.Length, recall = common / reference.Length;
        return common == 0 ? 0 : 2 * precision * recall / (precision + recall);
    }

    private static int Common(string[] a, string[] b)
    {
        var row = new int[b.Length + 1];
        foreach (string word in a)
        {
            int diagonal = 0;
            for (int j = 1; j <= b.Length; j++)
            {
                int longest = word == b[j - 1] ? diagonal + 1 : Math.Max(row[j], row[j - 1]);
                (diagonal, row[j]) = (row[j], longest);
            }
        }

        return row[^1];
    }

    private static string[] Words(string text) => new string([.. PythonText.Lower(text).Select(
        c => char.IsAsciiLetterLower(c) || char.IsAsciiDigit(c) ? c : ' ')])
        .Split(' ', StringSplitOptions.RemoveEmptyEntries);
}

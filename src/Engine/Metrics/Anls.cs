using System.Text;

namespace MiniCpmNative.Engine.Metrics;

/// <summary>
/// Average normalised Levenshtein similarity (Biten et al. 2019) as the script of DocVQA and
/// InfographicVQA has it: 1 - distance / length, of lower-cased texts with single spaces, the best
/// reference's; below 0.5 it is 0. The length is that of the texts as they came, white space
/// around included.
/// </summary>
public static class Anls
{
    public static double Score(string answer, IReadOnlyList<string> references)
    {
        double best = 0;
        foreach (string reference in references)
        {
            int length = Math.Max(
                PythonText.UpperLength(answer), PythonText.UpperLength(reference));
            double far = length == 0
                ? 0 : (double)Distance(Plain(answer), Plain(reference)) / length;
            best = Math.Max(best, 1 - far);
        }

        return best < 0.5 ? 0 : best;

        static string Plain(string text) =>
            string.Join(' ', PythonText.Split(PythonText.Lower(text)));
    }

    /// <summary>Levenshtein distance in code points.</summary>
    public static int Distance(string a, string b)
    {
        Rune[] left = [.. a.EnumerateRunes()], right = [.. b.EnumerateRunes()];
        int[] row = [.. Enumerable.Range(0, right.Length + 1)];
        for (int i = 1; i <= left.Length; i++)
        {
            int diagonal = row[0];
            row[0] = i;
            for (int j = 1; j <= right.Length; j++)
            {
                int change = diagonal + (left[i - 1] == right[j - 1] ? 0 : 1);
                diagonal = row[j];
                row[j] = Math.Min(change, Math.Min(row[j], row[j - 1]) + 1);
            }
        }

        return row[^1];
    }
}

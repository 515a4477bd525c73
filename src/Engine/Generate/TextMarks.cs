namespace MiniCpmNative.Engine.Generate;

/// <summary>Texts that are looked for in an answer while it comes.</summary>
public static class TextMarks
{
    /// <summary>Where the first of them stands; -1 for none.</summary>
    public static int Find(string text, IEnumerable<string> marks, out string found)
    {
        (int first, found) = (-1, "");
        foreach (string mark in marks)
            if (text.IndexOf(mark, StringComparison.Ordinal) is >= 0 and var at
                && (first < 0 || at < first))
                (first, found) = (at, mark);
        return first;
    }

    /// <summary>How much of a text's end may be the beginning of one.</summary>
    public static int Open(string text, IEnumerable<string> marks)
    {
        int open = 0;
        foreach (string mark in marks)
            for (int n = Math.Min(mark.Length - 1, text.Length); n > open; n--)
                if (text.EndsWith(mark[..n], StringComparison.Ordinal)) open = n;
        return open;
    }
}

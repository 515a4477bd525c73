namespace MiniCpmNative.Engine.Data.Text;

/// <summary>What is done to a text before it is cut into words.</summary>
internal abstract class TextNormalizer
{
    /// <summary>The very same span when nothing changes.</summary>
    public abstract ReadOnlySpan<char> Normalize(ReadOnlySpan<char> text);
}

/// <summary>
/// The normalizer of a tokenizer.json: NFC, SentencePiece's "▁" for every space, and one more in
/// front of the text, each where the file says so.
/// </summary>
internal sealed class FileNormalizer(bool nfc, bool spaces, bool prepends) : TextNormalizer
{
    /// <summary>SentencePiece's space.</summary>
    public const char Space = '\u2581';

    public override ReadOnlySpan<char> Normalize(ReadOnlySpan<char> text)
    {
        if (nfc) text = Nfc.Normalize(text);
        return spaces || prepends ? Mark(text, spaces, prepends) : text;
    }

    /// <summary>The text with its spaces and its beginning marked.</summary>
    public static ReadOnlySpan<char> Mark(ReadOnlySpan<char> text, bool spaces, bool prepends)
    {
        if (text.IsEmpty) return text;
        var marked = new char[text.Length + (prepends ? 1 : 0)];
        marked[0] = Space;
        var rest = marked.AsSpan(prepends ? 1 : 0);
        text.CopyTo(rest);
        if (spaces) rest.Replace(' ', Space);
        return marked;
    }
}

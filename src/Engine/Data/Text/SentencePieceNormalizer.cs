using System.Buffers;
using System.Text;

namespace MiniCpmNative.Engine.Data.Text;

/// <summary>
/// The normalizer of a SentencePiece model: the character map on everything but user-defined
/// pieces, "▁" for every space and in front of the text, runs of spaces made one and those at the
/// ends taken away, as the model says.
/// </summary>
internal sealed class SentencePieceNormalizer(
    CharacterMap? characters, AddedTokens userDefined, bool prepends, bool removesExtra)
    : TextNormalizer
{
    private const char Space = FileNormalizer.Space;

    public override ReadOnlySpan<char> Normalize(ReadOnlySpan<char> text)
    {
        if (characters is null && !removesExtra)
            return FileNormalizer.Mark(text, spaces: true, prepends);
        var to = new StringBuilder(text.Length + 1);
        if (prepends && !text.IsEmpty) to.Append(Space);
        bool afterSpace = removesExtra;
        var pieces = userDefined.In(text);
        int from = 0;
        while (pieces.Next() is { } piece)
        {
            Map(text[from..pieces.Start], to, ref afterSpace);
            Append(piece.Content, to, ref afterSpace);
            from = pieces.End;
        }
        Map(text[from..], to, ref afterSpace);
        int end = to.Length;
        if (removesExtra)
            while (end > 0 && to[end - 1] == Space) end--;
        return to.ToString(0, end);
    }

    private void Map(ReadOnlySpan<char> text, StringBuilder to, ref bool afterSpace)
    {
        if (characters is null)
        {
            for (int i = 0; i < text.Length; i++) Append(text.Slice(i, 1), to, ref afterSpace);
            return;
        }
        // A lone surrogate becomes U+FFFD here.
        ReadOnlySpan<byte> bytes = Encoding.UTF8.GetBytes(text.ToArray());
        Span<char> one = stackalloc char[2];
        while (!bytes.IsEmpty)
        {
            if (characters.Replaces(bytes, out int length, out var replacement))
            {
                Append(Encoding.UTF8.GetString(replacement), to, ref afterSpace);
            }
            else
            {
                Rune.DecodeFromUtf8(bytes, out var letter, out length);
                Append(one[..letter.EncodeToUtf16(one)], to, ref afterSpace);
            }
            bytes = bytes[length..];
        }
    }

    private void Append(ReadOnlySpan<char> text, StringBuilder to, ref bool afterSpace)
    {
        if (afterSpace) text = text.TrimStart(' ');
        if (!text.IsEmpty)
        {
            foreach (char c in text) to.Append(c == ' ' ? Space : c);
            afterSpace = text[^1] == ' ';
        }
        if (!removesExtra) afterSpace = false;
    }
}

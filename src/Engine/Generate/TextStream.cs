using System.Text;
using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Engine.Generate;

/// <summary>
/// The text of tokens as they come, by the rule of transformers' TextStreamer: up to the last
/// space, or all of it where it ends with a line or a Chinese character; so unfinished characters
/// and words are held back. Unlike there all tokens are decoded each time, and the pieces together
/// are the text of the whole.
/// </summary>
public sealed class TextStream(Tokenizer tokenizer)
{
    private readonly List<int> _ids = [];
    private string _told = "";

    /// <summary>All the text so far.</summary>
    public string Text => tokenizer.Decode([.. _ids]);

    /// <summary>What can be told now, perhaps nothing.</summary>
    public string Add(int id)
    {
        _ids.Add(id);
        string text = Text;
        return Tell(text, text.EndsWith('\n') || EndsChinese(text)
            ? text.Length : text.LastIndexOf(' ') + 1);
    }

    /// <summary>What is left.</summary>
    public string End()
    {
        string text = Text;
        return Tell(text, text.Length);
    }

    private string Tell(string text, int end)
    {
        int from = Place(text);
        if (end <= from) return "";
        string piece = text[from..end];
        _told += piece;
        return piece;
    }

    // Where in a text what has been told ends. Later tokens may change the spaces of an earlier
    // part, never its letters.
    private int Place(string text)
    {
        if (text.StartsWith(_told, StringComparison.Ordinal)) return _told.Length;
        int letters = _told.Count(c => !char.IsWhiteSpace(c)), at = 0;
        for (; at < text.Length && letters > 0; at++)
            if (!char.IsWhiteSpace(text[at])) letters--;
        while (at < text.Length && _told.EndsWith(' ') && text[at] == ' ') at++;
        return at;
    }

    private static bool EndsChinese(string text) =>
        Rune.DecodeLastFromUtf16(text, out Rune last, out _) == System.Buffers.OperationStatus.Done
        && last.Value is (>= 0x4E00 and <= 0x9FFF) or (>= 0x3400 and <= 0x4DBF)
            or (>= 0x20000 and <= 0x2A6DF) or (>= 0x2A700 and <= 0x2CEAF)
            or (>= 0xF900 and <= 0xFAFF) or (>= 0x2F800 and <= 0x2FA1F);
}

using System.Text;
using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Engine.Generate;

/// <summary>
/// The text of tokens as they come, by the rule of transformers' TextStreamer: up to the last space,
/// or all of it where it ends with a line or a Chinese character; so unfinished characters and words
/// are held back. Unlike there all tokens are decoded each time, and the pieces together are the
/// text of the whole.
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
        // Later tokens may change the start of a text, by a space in front of it.
        int at = text.StartsWith(_told, StringComparison.Ordinal)
            ? 0 : Math.Max(0, text.IndexOf(_told, StringComparison.Ordinal));
        int from = Math.Min(at + _told.Length, text.Length);
        if (end <= from) return "";
        string piece = text[from..end];
        _told += piece;
        return piece;
    }

    private static bool EndsChinese(string text) =>
        Rune.DecodeLastFromUtf16(text, out Rune last, out _) == System.Buffers.OperationStatus.Done
        && last.Value is (>= 0x4E00 and <= 0x9FFF) or (>= 0x3400 and <= 0x4DBF)
            or (>= 0x20000 and <= 0x2A6DF) or (>= 0x2A700 and <= 0x2CEAF)
            or (>= 0xF900 and <= 0xFAFF) or (>= 0x2F800 and <= 0x2FA1F);
}

namespace MiniCpmNative.GpuEmulator.Ptx;

/// <summary>One token: a word (names, opcodes with their modifiers, numbers), a string or a
/// sign.</summary>
internal readonly record struct Token(string Text, int Line, bool IsString = false);

/// <summary>Splits PTX text into tokens; comments go, a '.' belongs to the word it
/// touches.</summary>
internal static class PtxLexer
{
    public static List<Token> Split(string text)
    {
        var tokens = new List<Token>(text.Length / 5);
        int line = 1, at = 0;
        while (at < text.Length)
        {
            char c = text[at];
            if (c == '\0') break;
            if (c == '\n') { line++; at++; continue; }
            if (char.IsWhiteSpace(c)) { at++; continue; }
            if (c == '/' && at + 1 < text.Length && text[at + 1] == '/')
            {
                while (at < text.Length && text[at] != '\n') at++;
                continue;
            }
            if (c == '/' && at + 1 < text.Length && text[at + 1] == '*')
            {
                int end = text.IndexOf("*/", at + 2, StringComparison.Ordinal);
                if (end < 0) throw new PtxException($"line {line}: comment does not end");
                line += text.AsSpan(at, end - at).Count('\n');
                at = end + 2;
                continue;
            }
            if (c == '"')
            {
                int end = text.IndexOf('"', at + 1);
                if (end < 0) throw new PtxException($"line {line}: string does not end");
                tokens.Add(new(text[(at + 1)..end], line, IsString: true));
                at = end + 1;
                continue;
            }
            if (IsWord(c))
            {
                int start = at;
                while (at < text.Length && (IsWord(text[at]) || IsScope(text, at))) at++;
                tokens.Add(new(text[start..at], line));
                continue;
            }
            if (!",;[]{}()<>:@!|+-=*".Contains(c))
                throw new PtxException($"line {line}: unexpected character '{c}'");
            tokens.Add(new(c.ToString(), line));
            at++;
        }
        return tokens;
    }

    private static bool IsWord(char c) => char.IsAsciiLetterOrDigit(c)
        || c is '_' or '$' or '%' or '.';

    // "ld.shared::cta": a modifier may hold a double colon.
    private static bool IsScope(string text, int at) =>
        text[at] == ':' && (at + 1 < text.Length && text[at + 1] == ':' || text[at - 1] == ':');
}

using System.Text;
using MiniCpmNative.Engine;

namespace MiniCpmNative.Cli;

/// <summary>
/// A stream of the console that never ends a run and takes no orders from a file. When it cannot be
/// written (disk full, terminal closed) this is said once, elsewhere, and the rest is dropped.
/// Control characters that a terminal acts on come out as \uXXXX, except what lines are made of:
/// line ends, tabs, and the carriage returns and backspaces of a progress line.
/// </summary>
internal sealed class Screen(TextWriter console, Action<string>? said = null) : TextWriter
{
    private readonly Lock _turn = new();
    private volatile bool _hasFailed;

    /// <summary>Whether something could not be written.</summary>
    public bool HasFailed => _hasFailed;

    public override Encoding Encoding => console.Encoding;

    public override void Write(char value) => Write([value]);

    public override void Write(char[] buffer, int index, int count) =>
        Write(buffer.AsSpan(index, count));

    public override void Write(string? value) => Write(value.AsSpan());

    public override void Write(StringBuilder? value)
    {
        if (value is null) return;
        foreach (ReadOnlyMemory<char> piece in value.GetChunks()) Write(piece.Span);
    }

    public override void WriteLine() => Write(CoreNewLine);

    public override void WriteLine(string? value) => Write(value + NewLine);

    public override void WriteLine(ReadOnlySpan<char> value) => WriteLine(value.ToString());

    public override void Write(ReadOnlySpan<char> text)
    {
        if (text.ContainsAny(s_orders)) text = Harmless(text);
        lock (_turn)
        {
            if (_hasFailed) return;
            try
            {
                console.Write(text);
            }
            catch (Exception failure) when (IsOfTheStream(failure))
            {
                Fail(failure);
            }
        }
    }

    public override void Flush()
    {
        lock (_turn)
        {
            if (_hasFailed) return;
            try
            {
                console.Flush();
            }
            catch (Exception failure) when (IsOfTheStream(failure))
            {
                Fail(failure);
            }
        }
    }

    private static readonly System.Buffers.SearchValues<char> s_orders =
        System.Buffers.SearchValues.Create([.. Enumerable.Range(0, 0xA0).Select(c => (char)c)
            .Where(c => char.IsControl(c) && c is not ('\n' or '\r' or '\t' or '\b'))]);

    private static string Harmless(ReadOnlySpan<char> text)
    {
        var line = new StringBuilder(text.Length + 16);
        foreach (char c in text)
            if (s_orders.Contains(c)) line.Append($"\\u{(int)c:x4}");
            else line.Append(c);
        return line.ToString();
    }

    // A closed stream is "access denied" or "disposed" to .NET.
    private static bool IsOfTheStream(Exception failure) => failure is IOException
        or UnauthorizedAccessException or ObjectDisposedException or NotSupportedException;

    private void Fail(Exception failure)
    {
        _hasFailed = true;
        said?.Invoke("cpmx: the output cannot be written: "
            + $"{Messages.OneLine(failure.Message)}; going on without it");
    }
}

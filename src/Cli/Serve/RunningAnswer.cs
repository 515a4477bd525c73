using MiniCpmNative.Engine.Data.Text;
using MiniCpmNative.Engine.Generate;

namespace MiniCpmNative.Cli.Serve;

/// <summary>
/// The text of an answer as its tokens come: up to a stop text, of which nothing is told, not even
/// where only its beginning is there yet.
/// </summary>
internal sealed class RunningAnswer(AnswerJob job, Tokenizer tokenizer)
{
    private readonly TextStream _text = new(tokenizer);
    private string _held = "";
    private bool _stopped, _begun;

    /// <summary>False when it is over.</summary>
    public bool Take(int id)
    {
        job.Tokens++;
        Say(_text.Add(id));
        return !_stopped && job.Tokens < job.MaxTokens && !job.Gone.IsCancellationRequested;
    }

    /// <param name="ended">Whether the model ended it.</param>
    public void End(bool ended)
    {
        Say(_text.End());
        if (!_stopped) job.Tell(_held.TrimEnd());
        job.End(cut: !ended && !_stopped);
    }

    private void Say(string piece)
    {
        if (_stopped) return;
        _held += _begun ? piece : piece.TrimStart();
        _begun |= _held.Length > 0;
        int stop = -1;
        foreach (string text in job.Request.Stops)
            if (_held.IndexOf(text, StringComparison.Ordinal) is >= 0 and var at
                && (stop < 0 || at < stop))
                stop = at;
        _stopped = stop >= 0;
        int told = _stopped ? stop : _held.Length - Open();
        // White space is held back: at the end there is none.
        int end = _held.AsSpan(0, told).TrimEnd().Length;
        job.Tell(_held[..end]);
        _held = _held[end..];
    }

    // How much of the end may be the beginning of a stop text.
    private int Open()
    {
        int open = 0;
        foreach (string text in job.Request.Stops)
            for (int n = Math.Min(text.Length - 1, _held.Length); n > open; n--)
                if (_held.EndsWith(text[..n], StringComparison.Ordinal)) open = n;
        return open;
    }
}

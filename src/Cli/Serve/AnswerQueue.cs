using System.Threading.Channels;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Data.Text;
using MiniCpmNative.Engine.Generate;

namespace MiniCpmNative.Cli.Serve;

/// <summary>An answer that was asked for: its pieces come through a channel.</summary>
/// <param name="Input">The prompt.</param>
/// <param name="Request">What it came with.</param>
/// <param name="Adapted">Whether the adapter is at work.</param>
/// <param name="MaxTokens">Most tokens of the answer.</param>
/// <param name="Gone">Set when nobody waits any more.</param>
internal sealed record AnswerJob(
    GenerationInput Input, ChatRequest Request, bool Adapted, int MaxTokens, CancellationToken Gone)
{
    private readonly Channel<string> _pieces = Channel.CreateUnbounded<string>(
        new UnboundedChannelOptions { SingleReader = true, SingleWriter = true });

    /// <summary>The answer as it comes; a failure comes out of it.</summary>
    public ChannelReader<string> Pieces => _pieces.Reader;

    /// <summary>Functions that the answer calls; known at the end.</summary>
    public List<ToolCall> Calls { get; } = [];

    /// <summary>Tokens of the answer so far.</summary>
    public int Tokens { get; set; }

    /// <summary>"stop", "length" where it was cut, or "tool_calls"; known at the end.</summary>
    public string Finish { get; private set; } = "stop";

    public void Tell(string piece)
    {
        if (piece.Length > 0) _pieces.Writer.TryWrite(piece);
    }

    public void End(bool cut)
    {
        Finish = cut ? "length" : Calls.Count > 0 ? "tool_calls" : "stop";
        _pieces.Writer.TryComplete();
    }

    public void Fail(Exception failure) => _pieces.Writer.TryComplete(failure);
}

/// <summary>
/// Answers what was asked for, on a thread of its own, which alone touches the model. Requests of
/// the same settings that wait are answered together; an answer depends on its seed, not on what is
/// generated beside it.
/// </summary>
internal sealed class AnswerQueue : IDisposable
{
    private readonly AskedModel _model;
    private readonly Generator _generator;
    private readonly int _batch, _waiting;
    private readonly Lock _turn = new();
    private readonly List<AnswerJob> _jobs = [];
    private readonly SemaphoreSlim _news = new(0);
    private readonly Thread _worker;
    private bool _closed;

    /// <param name="model">Is touched by this queue alone from now on.</param>
    /// <param name="batch">Most answers at once.</param>
    /// <param name="waiting">Most requests that wait.</param>
    public AnswerQueue(AskedModel model, int batch, int waiting)
    {
        (_model, _batch, _waiting) = (model, batch, waiting);
        _generator = new Generator(model.Model, model.Counter);
        _worker = new Thread(Work) { IsBackground = true, Name = "answers" };
        _worker.Start();
    }

    /// <summary>False when too many wait.</summary>
    public bool TryAdd(AnswerJob job)
    {
        lock (_turn)
        {
            if (_closed)
            {
                job.Fail(Closing());
                return true;
            }

            _jobs.RemoveAll(waits => waits.Gone.IsCancellationRequested);
            if (_jobs.Count >= _waiting) return false;
            _jobs.Add(job);
        }

        _news.Release();
        return true;
    }

    /// <summary>Takes nothing more; who waits is told, what runs goes on.</summary>
    public void Close()
    {
        AnswerJob[] left;
        lock (_turn)
        {
            _closed = true;
            left = [.. _jobs];
            _jobs.Clear();
        }

        foreach (AnswerJob job in left) job.Fail(Closing());
        _news.Release();
    }

    /// <summary>Closes, and waits for what runs.</summary>
    public void Dispose()
    {
        Close();
        _worker.Join();
        _news.Dispose();
    }

    private static RunException Closing() => new("the server is being shut down");

    private void Work()
    {
        _model.Model.MakeCurrent();
        while (true)
        {
            _news.Wait();
            if (Next() is { } jobs) Answer(jobs);
            else if (_closed) return;
        }
    }

    // The first that waits, and others that can be answered with it.
    private List<AnswerJob>? Next()
    {
        lock (_turn)
        {
            _jobs.RemoveAll(job => job.Gone.IsCancellationRequested);
            if (_jobs.Count == 0) return null;
            AnswerJob first = _jobs[0];
            List<AnswerJob> chosen = [.. _jobs.Where(job => job.Adapted == first.Adapted
                && job.Request.Settings == first.Request.Settings).Take(_batch)];
            _jobs.RemoveAll(chosen.Contains);
            return chosen;
        }
    }

    private void Answer(List<AnswerJob> jobs)
    {
        var answers = jobs.ConvertAll(job => new RunningAnswer(job, _model.Rows.Prompts));
        try
        {
            _model.IsAdapted = jobs[0].Adapted;
            GenerationSettings settings = jobs[0].Request.Settings;
            int most = jobs.Max(job => job.MaxTokens);
            settings = settings with
            {
                MaxNewTokens = most,
                MinNewTokens = Math.Min(settings.MinNewTokens, most),
            };
            GeneratedTokens[] tokens = _generator.Run(
                [.. jobs.Select(job => job.Input)], settings,
                (i, id) => answers[i].Take(id),
                () => jobs.Exists(job => !job.Gone.IsCancellationRequested));
            for (int i = 0; i < jobs.Count; i++) answers[i].End(tokens[i].Stopped);
        }
        catch (Exception failure)
        {
            foreach (AnswerJob job in jobs) job.Fail(failure);
        }
    }
}

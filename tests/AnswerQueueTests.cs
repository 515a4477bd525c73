using System.Text;
using MiniCpmNative.Cli.Serve;
using MiniCpmNative.Engine.Generate;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>The thread that answers, without a server in front.</summary>
[TestFixture]
public sealed class AnswerQueueTests
{
    private const int Most = 1500;
    private AskedModel _model = null!;

    [OneTimeSetUp]
    public void Open() => _model = ServedModel.Open();

    [OneTimeTearDown]
    public void Close() => _model.Dispose();

    // No answer ends by itself here: the model's stop tokens are taken out.
    [Test]
    public async Task WhoLeavesIsForgotten()
    {
        using var queue = new AnswerQueue(_model, batch: 1, waiting: 1);
        using var running = new CancellationTokenSource();
        using var waits = new CancellationTokenSource();
        AnswerJob first = Job("Name a colour.", Most, running.Token);
        AnswerJob second = Job("Name a number.", Most, waits.Token);
        AnswerJob third = Job("Name a letter.", 3, default);
        Assert.That(queue.TryAdd(first));
        await first.Pieces.WaitToReadAsync();
        Assert.That(queue.TryAdd(second));
        Assert.That(queue.TryAdd(third), Is.False, "one waits, and no more may");
        await waits.CancelAsync();
        Assert.That(queue.TryAdd(third), "the place of one that left is free");
        await running.CancelAsync();
        await End(third);
        Assert.That(first.Tokens, Is.GreaterThan(0).And.LessThan(Most), "stopped in the middle");
        Assert.That(second.Tokens, Is.Zero, "never begun");
        Assert.That(third.Tokens, Is.EqualTo(3));
    }

    [Test]
    public async Task WhoWaitsIsToldThatItCloses()
    {
        using var queue = new AnswerQueue(_model, batch: 1, waiting: 4);
        AnswerJob first = Job("Name a colour.", 60, default), second = Job("A number?", 3, default);
        Assert.That(queue.TryAdd(first));
        await first.Pieces.WaitToReadAsync();
        Assert.That(queue.TryAdd(second));
        queue.Close();
        Assert.That(async () => await second.Pieces.Completion,
            Throws.InstanceOf<Engine.RunException>().With.Message.Contains("shut down"));
        await End(first);
        Assert.That(first.Tokens, Is.EqualTo(60), "what runs goes on");
    }

    private static async Task End(AnswerJob job)
    {
        using var patience = new CancellationTokenSource(TimeSpan.FromMinutes(2));
        await foreach (string _ in job.Pieces.ReadAllAsync(patience.Token))
        {
        }
    }

    private AnswerJob Job(string question, int tokens, CancellationToken gone)
    {
        ChatRequest request = ChatRequest.Read(Encoding.UTF8.GetBytes(
            $$"""{"messages": [{"role": "user", "content": "{{question}}"}]}"""),
            ServedModel.Settings(_model) with { StopIds = [] });
        GenerationInput input = new PromptMaker(_model.Model.Spec, _model.Rows).Make(
            request.Turns, [], request.System, request.Thinks);
        return new AnswerJob(input, request, true, tokens, gone);
    }
}

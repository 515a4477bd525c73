using MiniCpmNative.Cli.Serve;
using MiniCpmNative.Engine.Generate;

namespace MiniCpmNative.Tests;

/// <summary>The tiny V-2_6 with an adapter, as "tiny", behind cpmx serve.</summary>
internal sealed class ServedModel : IAsyncDisposable
{
    public const string Completions = "/v1/chat/completions";

    private ServedModel(AskedModel model, ChatServer server) => (Model, Server) = (model, server);

    public AskedModel Model { get; }

    public ChatServer Server { get; }

    public static AskedModel Open() => GenerationCase.Open(V26.Model,
        Path.Combine(ReferenceFile.Root, "v26", "adapters", "trained_lora_only"));

    public static GenerationSettings Settings(AskedModel model, int most = 2000) => new()
    {
        StopIds = model.Rows.Prompts.StopIds,
        RepetitionPenalty = 1.05,
        MaxNewTokens = most,
    };

    public static async Task<ServedModel> Start(ServeOptions options, int most = 2000)
    {
        AskedModel model = Open();
        var server = new ChatServer(options, "tiny", model, Settings(model, most),
            new PromptMaker(model.Model.Spec, model.Rows), _ => { });
        await server.Start();
        return new ServedModel(model, server);
    }

    public async ValueTask DisposeAsync()
    {
        await Server.Stop();
        await Server.DisposeAsync();
        Model.Dispose();
    }
}
